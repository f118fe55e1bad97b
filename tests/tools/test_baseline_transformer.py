"""The transformer in PyTorch: its forward pass, what it sees, how it is scored, and its settings."""

from __future__ import annotations

import math

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import import_torch

from flashlm_numba.system.errors import UserError
from tools import bench_train
from tools.bench import rows
from tools.bench.train_jobs import Job

torch = import_torch()

from tools.baseline import evaluate, optimizer  # noqa: E402  all need torch
from tools.baseline.__main__ import check  # noqa: E402
from tools.baseline.step import training_step  # noqa: E402
from tools.baseline.transformer import Transformer, TransformerConfig  # noqa: E402

SMALL = TransformerConfig(vocab_size=60, layers=2, width=16, heads=2, context=12)
EOT = 3


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Small shapes: torch's threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def some_model(config=SMALL):
    """A model whose weights are large enough to matter, in float64."""
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.double()


def log_probs(model, ids):
    """ln p of every token at every position of ids (B, T): (B, T, V)."""
    with torch.no_grad():
        logits = model.hidden(ids) @ model.embedding.weight.T
    return logits.log_softmax(dim=-1).view(*ids.shape, -1)


def forward_by_definition(model, ids):
    """Hidden states (T, C) of ids (T,) in NumPy and float64, a position at a time."""
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    config, size = model.config, model.config.width // model.config.heads

    def norm(x, name):
        eps = np.finfo(np.float64).eps  # that of nn.RMSNorm
        return weights[name] * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)

    def turned(x, position):  # (H, D), channel i with channel i + D/2 as one complex number
        z = x[:, : size // 2] + 1j * x[:, size // 2 :]
        z = z * np.exp(1j * position * 10_000.0 ** (-2 * np.arange(size // 2) / size))
        return np.concatenate([z.real, z.imag], axis=1)

    x = weights["embedding.weight"][ids]
    for number in range(config.layers):
        at = f"blocks.{number}."
        rows = norm(x, at + "norm1.weight") @ weights[at + "attention.qkv.weight"].T
        q, k, v = rows.reshape(len(ids), 3, config.heads, size).transpose(1, 0, 2, 3)
        mixed = np.zeros((len(ids), config.heads, size))
        for t in range(len(ids)):
            for head in range(config.heads):
                near = [turned(q[t], t)[head] @ turned(k[s], s)[head] / math.sqrt(size) for s in range(t + 1)]
                share = np.exp(near - np.max(near))
                mixed[t, head] = share / share.sum() @ v[: t + 1, head]
        x = x + mixed.reshape(len(ids), -1) @ weights[at + "attention.out.weight"].T
        n = norm(x, at + "norm2.weight")
        gate = n @ weights[at + "ffn.gate.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (n @ weights[at + "ffn.up.weight"].T)
        x = x + inner @ weights[at + "ffn.down.weight"].T
    return norm(x, "final_norm.weight")


def test_the_forward_pass_is_its_definition():
    model, ids = some_model(), torch.randint(0, 60, (2, 11))
    got = model.hidden(ids).detach().numpy().reshape(2, 11, -1)
    for row, found in zip(ids, got, strict=True):
        np.testing.assert_allclose(found, forward_by_definition(model, row.numpy()), atol=1e-5)  # float32 angles


def test_the_default_has_five_million_parameters_all_of_them_adamws():
    model = Transformer(TransformerConfig(8_192))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 8_192 * 256 + 4 * (4 * 256**2 + 3 * 256 * 704 + 2 * 256) + 256
    groups = optimizer.parameter_groups(model, "adamw")
    assert groups["normuon"] == []
    assert sorted(name for names in groups.values() for name in names) == sorted(sizes)
    assert all("norm" in name for name in groups["no_decay"])


def test_no_later_token_changes_a_bit():
    model = some_model(TransformerConfig(60, layers=3, width=32, heads=4, context=64)).float()
    ids = torch.randint(0, 60, (2, 64))
    before = log_probs(model, ids)
    for at in (1, 2, 31, 32, 33, 63):
        changed = ids.clone()
        changed[:, at:] = (ids[:, at:] + torch.randint(1, 60, (2, 64 - at))) % 60
        after = log_probs(model, changed)
        assert torch.equal(after[:, :at], before[:, :at]), at
        assert not torch.equal(after[:, at:], before[:, at:]), at


def test_it_learns_a_text_by_heart():
    model = Transformer(SMALL)
    optimizers = optimizer.Optimizers(model, matrices="adamw", adamw_lr=0.01, betas=(0.9, 0.95))
    text = torch.randint(0, 60, (4, 13))
    losses = [training_step(model, optimizers, [(text[:, :-1], text[:, 1:])]) for _ in range(120)]
    assert losses[0] == pytest.approx(math.log(60), abs=0.3)
    assert losses[-1] < 0.5


class Documents:
    """What score() needs of a split."""

    n_bytes = 1_000

    def __init__(self, *documents):
        self.list = [np.asarray(d, np.int32) for d in documents]

    def documents(self, max_tokens=None):
        assert max_tokens is None
        return iter(self.list)


def nll_in_one_pass(model, document):
    """-ln p of each token (n,) of a document that fits into the context."""
    inputs = torch.from_numpy(np.concatenate([[EOT], document[:-1]]).astype(np.int64))
    return -log_probs(model, inputs[None])[0, torch.arange(len(document)), torch.from_numpy(document).long()].numpy()


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_short_documents_are_scored_as_in_one_pass(rows):
    model, rng = some_model(), np.random.default_rng(0)
    split = Documents(*(rng.integers(0, 60, n) for n in (1, 5, 6, 7, 11, 12)))
    total = sum(nll_in_one_pass(model, document).sum() for document in split.list)
    got = evaluate.score(model, split, eot=EOT, rows=rows)
    assert got["tokens"] == 42
    assert got["nll"] == pytest.approx(total / 42, abs=1e-9)
    assert got["bits_per_byte"] == pytest.approx(total / math.log(2) / 1_000)


def test_long_documents_are_scored_once_with_half_a_context_before_each_token():
    model, rng = some_model(), np.random.default_rng(0)
    for n in (13, 18, 19, 41):
        document = rng.integers(0, 60, n).astype(np.int32)
        parts = [nll_in_one_pass(model, document[:12])]
        for scored in range(12, n, 6):  # inputs begin with the token before the first one that is read
            inputs = document[scored - 7 : scored + 5].astype(np.int64)
            want = document[scored : scored + 6]
            found = log_probs(model, torch.from_numpy(inputs[: 6 + len(want)])[None])[0, 6:]
            parts.append(-found[torch.arange(len(want)), torch.from_numpy(want).long()].numpy())
        got = evaluate.score(model, Documents(document), eot=EOT)
        assert got["tokens"] == n
        assert got["nll"] == pytest.approx(np.concatenate(parts).mean(), abs=1e-9)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="at most 12 tokens, got 13"):
        some_model().hidden(torch.zeros(1, 13, dtype=torch.int64))


def test_the_job_asks_for_a_rate_that_falls_over_the_whole_run():
    words = Job("torch:transformer", ("adamw_lr=4e-3", "phases=16x512", "width=320"), 1, 1_000_000, None, 2).command
    for name, value in (
        ("trunk", "transformer"),
        ("batch", "16x512"),
        ("width", "320"),
        ("adamw-lr", "4e-3"),
        ("steps", "123"),
        ("decay", "123"),
        ("matrices", "adamw"),
    ):
        assert words[words.index(f"--{name}") + 1] == value
    assert "--dilations" not in words
    words = Job("torch:transformer", ("warmdown_ratio=0.4",), 1, 204_800, None, 2).command
    assert words[words.index("--decay") + 1] == "40"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("width=100", "The transformer's width must be a multiple of twice its heads, got 100 and 4 heads."),
        ("layers=0", "The transformer's layers must be at least 1, got 0."),
        ("heads=many", "Invalid value for '--heads': 'many' is not a valid integer."),
        ("phases=0x256", "The sizes of a batch must be at least 1, got '0x256'."),
        ("phases=8", "A phase is written LAST_STEP:BATCH_SIZExSEQ_LENxGRAD_ACCUM, like 1000:4x64x4, got '8'."),
        ("warmdown_ratio=2", "warmdown_ratio must be a number from 0 to 1, got '2'."),
        ("warmdown_ratio=x", "warmdown_ratio must be a number from 0 to 1, got 'x'."),
        ("dilations=[1,4]", "torch:transformer knows no setting dilations; it has phases, warmup_steps, adamw_lr"),
    ],
)
def test_a_wrong_setting_is_a_sentence_before_the_first_run(setting, sentence, corpus, tmp_path):
    words = [corpus, tmp_path / "rows.json", "torch:transformer", "--tokens", 4_096, "--set", setting]
    done = CliRunner().invoke(bench_train.main, [str(word) for word in words])
    assert done.exit_code == 2
    assert sentence in done.output
    assert not (tmp_path / "rows.json").exists()


def test_settings_that_cannot_be_trained_are_a_sentence():
    check(["--trunk", "transformer", "--batch", "8x256", "--steps", "1"])
    with pytest.raises(UserError, match="The transformer has a dense head"):
        check(["--trunk", "transformer", "--head", "adaptive"])
    with pytest.raises(UserError, match="Give --steps or --minutes"):
        check(["--trunk", "transformer", "--batch", "8x256"])
    with pytest.raises(UserError, match=r"Integers are separated by commas, like 1,4,64, got '1\.5'"):
        check(["--dilations", "1.5"])


@pytest.mark.slow
def test_it_is_trained_and_scored_for_a_row(corpus, tmp_path):
    path = tmp_path / "rows.json"
    sets = [word for setting in ("phases=2x16", "width=16", "heads=2", "layers=1") for word in ("--set", setting)]
    words = [corpus, path, "torch:transformer", "--tokens", 128, "--threads", 1, *sets]
    done = CliRunner().invoke(bench_train.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    (row,) = rows.read_rows(path)
    assert (row["steps"], row["tokens"]) == (4, 128)
    assert row["parameters"] == 50_257 * 16 + 4 * 16**2 + 3 * 16 * 64 + 3 * 16
    assert 9 < row["nll"] < 11
    assert row["bits_per_byte"] > 0
    assert row["scored_tokens"] == row["data"]["validation"]
