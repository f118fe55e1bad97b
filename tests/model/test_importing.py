"""`flashlm-numba import`: published MatMul-free LMs compute what the oracles compute, and commands read the result."""

import json

import numpy as np
import pytest
from helpers import command, import_torch
from mmf_folder import bfloat16, write_folder
from mmf_tokenizer import tokenizer_json
from mmf_twin import Twin, random_parameters
from safetensors import safe_open

import flashlm_numba as fl
from flashlm_numba.model import packed
from flashlm_numba.system.errors import UserError

SHAPES = {
    "small": {"vocab": 300, "dim": 16, "width": 16, "ffn_dim": 24, "n_blocks": 3},
    "odd": {"vocab": 300, "dim": 50, "width": 50, "ffn_dim": 134, "n_blocks": 2},
    "one block": {"vocab": 300, "dim": 8, "width": 8, "ffn_dim": 5, "n_blocks": 1},
}
FAR = 2e-3  # a float32 input that is not nearer to a half than this is rounded as in float64


def run_import(folder, out, *arguments):
    done = command("import", folder, out, *arguments)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A function that imports a model of random weights, once per shape and options: the parameters and the file."""
    made = {}

    def make(shape, **options):
        key = shape, *sorted(options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("published")
            parameters = random_parameters(7, **SHAPES[shape])
            if options.get("use_lower_bound") is False:
                del parameters["lower_bounds"]
            write_folder(folder, parameters, SHAPES[shape], tokenizer=tokenizer_json(), **options)
            out = folder / "imported.safetensors"
            run_import(folder, out)
            made[key] = parameters, out, folder
        return made[key]

    return make


def decided(twin, vocab, time=6, batch=2):
    """Ids for which no input of the twin is near a half, and its logits."""
    for seed in range(2_000):
        ids = np.random.default_rng(seed).integers(0, vocab, (batch, time))
        twin.closest = 0.5
        logits = twin.logits(ids)
        if twin.closest > FAR / (batch * time):
            return ids, logits
    raise AssertionError("no ids are decided")


def twin_of(parameters, **options):
    return Twin({name: value.astype(np.float64) for name, value in parameters.items()}, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shards", [0, 2])
def test_logits_are_those_of_the_twin(imported, shape, shards):
    parameters, out, _ = imported(shape, shards=shards)
    ids, expected = decided(twin_of(parameters), 300)
    found = fl.load(out).logits(ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_narrow_weights_are_those_of_the_widened_ones(imported, dtype):
    parameters, out, _ = imported("odd", dtype=dtype)
    narrow = {n: bfloat16(v) if dtype == "bfloat16" else v.astype(dtype) for n, v in parameters.items()}
    ids, expected = decided(twin_of(narrow), 300)
    np.testing.assert_allclose(fl.load(out).logits(ids), expected, rtol=0, atol=2e-5)


def test_settings_that_are_honoured(imported):
    parameters, out, _ = imported("small", use_lower_bound=False, rms_norm_eps=1e-3)
    ids, expected = decided(twin_of(parameters, eps=1e-3, use_lower_bounds=False), 300)
    model = fl.load(out)
    np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=2e-5)
    assert model.config.model.norm_eps == 1e-3
    parameters, out, _ = imported("small", tie_word_embeddings=True)
    tied = parameters | {"head.weight": parameters["embedding.weight"]}
    ids, expected = decided(twin_of(tied), 300)
    np.testing.assert_allclose(fl.load(out).logits(ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_torch_module(imported, shape):
    torch = import_torch()
    from mmf_twin import authors_names
    from torch_mmf import MatMulFreeLM

    parameters, out, _ = imported(shape, shards=0)
    ids, _ = decided(twin_of(parameters), 300)
    module = MatMulFreeLM(**SHAPES[shape])
    module.load({there: parameters[here] for here, there in authors_names(SHAPES[shape]["n_blocks"])})
    with torch.no_grad():
        expected = module(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(fl.load(out).logits(ids), expected, rtol=0, atol=2e-5)


def test_decoding_gives_the_same_logits(imported):
    _, out, _ = imported("odd", shards=0)
    model = fl.load(out)
    ids = np.random.default_rng(0).integers(0, 300, (1, 12))
    logits = model.logits(ids)[0]
    state, h = model.model.prefill(ids[0, :5].astype(np.int32))
    for t in range(5, 12):
        np.testing.assert_array_equal(model.head.logits(h.copy())[0], logits[t - 1])
        h = model.model.decode_step(state, int(ids[0, t]))


def test_the_file_packs_every_ternary_matrix(imported):
    parameters, out, _ = imported("odd", shards=0)
    with safe_open(out, framework="numpy") as file:
        names = set(file.keys())
        scale = file.get_tensor("head.weight.scale")
    ternary = {n for n, v in parameters.items() if v.ndim == 2 and n not in ("embedding.weight", "lower_bounds")}
    assert {name.removesuffix(".base3") for name in names if name.endswith(".base3")} == ternary
    assert {name.removesuffix(".scale") for name in names if name.endswith(".scale")} == ternary
    np.testing.assert_allclose(scale, np.abs(parameters["head.weight"]).mean(), rtol=1e-6)
    _, tensors, _, _ = packed.read(out)
    for name in ternary:
        sizes = np.unique(np.abs(tensors[name]))
        assert len(sizes) <= 2
        np.testing.assert_allclose(sizes[-1], np.abs(parameters[name]).mean(), rtol=1e-6)


def test_the_commands_read_it(imported, tmp_path):
    parameters, out, _ = imported("odd", shards=0)
    info = json.loads(command("info", out, "--json").stdout)
    assert (info["head"], info["vocab_size"], info["rows"]) == ("bitlinear", 300, "float")
    assert info["parameters"] == sum(value.size for value in parameters.values())
    text = tmp_path / "text.txt"
    text.write_text("the people, and the land.\n" * 4)
    score = json.loads(command("eval", out, text, "--json").stdout)
    ids = [1, *fl.load(out).vocabulary.encode(text.read_text())]
    twin = twin_of(parameters)
    nll = twin.nll(np.array([ids[:-1]]), np.array([ids[1:]]))
    assert score["tokens"] == len(ids) - 1
    assert score["nll"] == pytest.approx(nll, abs=0.05)  # some inputs may be near a half
    generate = ("generate", out, "--prompt", "the people", "--seed", 1, "--max-tokens", 8)
    texts = [command(*generate).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert fl.load(out).generate("the people", seed=1, max_tokens=8) == texts[0].removeprefix(
        "the people"
    ).removesuffix("\n")
    assert len(fl.load(out).next_tokens("the people", k=3)) == 3


def test_without_a_tokenizer_it_computes_by_ids(tmp_path):
    parameters = random_parameters(0, **SHAPES["one block"])
    folder, out = write_folder(tmp_path / "model", parameters, SHAPES["one block"]), tmp_path / "out.safetensors"
    done = run_import(folder, out)
    assert "has no tokenizer.json, so the imported model takes token ids and no text." in done.stderr
    assert fl.load(out).logits([[1, 2, 3]]).shape == (1, 3, 300)
    assert command("info", out).exit_code == 0
    (tmp_path / "text.txt").write_text("the people\n")
    for arguments in (("generate", out), ("generate", out, "--prompt", "a"), ("eval", out, tmp_path / "text.txt")):
        refused = command(*arguments)
        assert refused.exit_code == 1
        assert refused.stderr.strip().splitlines()[-1] == (
            "Error: This model was imported without a tokenizer, so it takes token ids and no text; import it again "
            "from a folder with its tokenizer.json."
        )


def test_what_the_tokenizer_loses_is_named_once(tmp_path):
    content = json.loads(tokenizer_json())
    content["model"]["byte_fallback"] = False
    shape = SHAPES["one block"]
    folder = write_folder(tmp_path / "model", random_parameters(0, **shape), shape, tokenizer=json.dumps(content))
    done = run_import(folder, tmp_path / "out.safetensors")
    assert done.stderr.count("The tokenizer does not keep every text:") == 1
    assert command("generate", tmp_path / "out.safetensors", "--prompt", "the", "--max-tokens", 3).exit_code == 0
    (tmp_path / "text.txt").write_text("the people, and a text.")
    scored = command("eval", tmp_path / "out.safetensors", tmp_path / "text.txt")
    assert scored.exit_code == 0
    assert "so its bits per byte are too low where that is lost." in scored.stderr
    asked = command("eval", tmp_path / "out.safetensors", tmp_path / "text.txt", "--memory", "ngrams")
    assert asked.exit_code == 1
    assert "was imported, and its training text is not known; leave out --memory." in asked.stderr


def test_rounded_rows(imported, tmp_path):
    parameters, exact, folder = imported("odd", shards=0)
    out = tmp_path / "int8.safetensors"
    run_import(folder, out, "--rows", "int8")
    assert out.stat().st_size < exact.stat().st_size
    np.testing.assert_allclose(
        fl.load(out).parameters["embedding.weight"], parameters["embedding.weight"], rtol=0, atol=0.02
    )


def test_nothing_is_overwritten_and_nothing_is_left(imported, tmp_path):
    _, out, folder = imported("small", shards=0)
    before = out.read_bytes()
    done = command("import", folder, out)
    assert done.exit_code == 1
    assert "already exists; choose another file, or remove it." in done.stderr
    assert out.read_bytes() == before
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert "already exists" in command("import", folder, link).stderr
    assert link.is_symlink()
    link.unlink()
    (tmp_path / "file").touch()
    done = command("import", folder, tmp_path / "file" / "out")
    assert done.exit_code == 1
    assert "could not be written" in done.stderr
    (tmp_path / "file").unlink()
    shape = SHAPES["small"]
    parameters = random_parameters(0, **shape)
    parameters["head.weight"][3, 3] = np.inf
    broken = write_folder(tmp_path / "broken", parameters, shape)
    done = command("import", broken, tmp_path / "new.safetensors")
    assert done.exit_code == 1
    assert "holds values that are not finite (for head.weight); copy it again." in done.stderr
    done = command("import", write_folder(tmp_path / "conv", parameters, shape, use_short_conv=True), tmp_path / "new")
    assert "has use_short_conv True" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "conv"]


def test_a_forged_scale_is_refused(imported, tmp_path):
    """A scale that is not finite must not become weights."""
    _, out, _ = imported("small", shards=0)
    config, tensors, state, tokenizer = packed.read(out)
    name = "head.weight"
    tensors[name] = np.sign(tensors[name])  # NaN as the scale
    path = tmp_path / "forged.safetensors"
    rest = [n for n in tensors if n != name]
    state.pop("rows")
    packed.write(
        path, {n: tensors[n] for n in [*rest, name]}, [name], config, state, tokenizer, "float", {name: np.nan}
    )
    with pytest.raises(UserError, match=r"damaged \(the scale of head.weight is nan\)"):
        packed.read(path)
