"""A model from a run's settings: new, or out of a checkpoint; and where a run's data lies."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.data.builtin import cached_corpus, default_corpus
from flashlm_numba.data.manifest import MANIFEST, Manifest
from flashlm_numba.data.shards import TokenData, open_tokens
from flashlm_numba.data.tokenizer import VOCABULARIES, Vocabulary, vocabulary_named
from flashlm_numba.heads import DenseHead, SampledHead
from flashlm_numba.heads.label_tree import Tree, build_tree, check_shape
from flashlm_numba.heads.tree import TreeHead, default_rank
from flashlm_numba.kernels.ternary import ternarize
from flashlm_numba.model import checkpoint, packed
from flashlm_numba.model.config import HeadConfig, ModelConfig, RunConfig
from flashlm_numba.model.model import Model, initial_parameters
from flashlm_numba.system.cache import cache_roots, writable_cache
from flashlm_numba.system.compiled import ensure_compiled
from flashlm_numba.system.display import peak_rss_mb
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.process import run_apart

Note = Callable[[str], None]  # shows a line to the user


def say(line: str) -> None:
    """Show a line on standard error."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Loaded:
    """A model out of a run's checkpoint."""

    run: RunConfig
    model: Model
    state: dict[str, Any]  # state.json: step, tokens, seconds, ...


def read_config(folder: Path) -> RunConfig:
    """The settings of a run's folder; UserError if there are none or they are not sane."""
    path = folder / "config.json"
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(f"There is no run at {folder}; give a folder that `flashlm-numba train` made.") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not a run; give a folder that `flashlm-numba train` made.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or start a new run.") from None


def load_model(folder: Path, checkpoint_name: str | None = None, *, ema: bool = False, note: Note = say) -> Loaded:
    """The model of a run's newest checkpoint, or the one named; with ema its running average of the weights.

    folder : of a run, or a file that export_run wrote, which holds one model.  note : told when the kernels have to be
        compiled first, which takes a minute or two
    Raises UserError if the checkpoint or the file is damaged, or no average was kept.
    """
    if folder.is_file():
        return _load_exported(folder, checkpoint_name, ema, note)
    run = read_config(folder)
    path = checkpoint.find(folder, checkpoint_name)
    state = checkpoint.check_state(checkpoint.load_state(path), path, run.model_hash)
    tensors = checkpoint.load(path, "model")
    if ema:
        if "ema.safetensors" not in state["files"]:
            raise UserError(f"{folder} keeps no running average of its weights; leave out --ema.")
        tensors |= checkpoint.load(path, "ema")
    ensure_compiled(note)
    return Loaded(run, model_from(run, tensors), state)


def _load_exported(path: Path, checkpoint_name: str | None, ema: bool, note: Note) -> Loaded:
    if checkpoint_name is not None or ema:
        raise UserError(f"{path} holds one model; leave out --checkpoint and --ema, or give the folder of a run.")
    config, tensors, state = packed.read(path)
    run = RunConfig.from_json(config, path)
    ensure_compiled(note)
    try:
        return Loaded(run, model_from(run, tensors), checkpoint.check_state(state, path))
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def export_run(folder: Path, out: Path, checkpoint_name: str | None = None, *, ema: bool = False) -> Path:
    """Write a run's model to one file, with its ternary weights packed; eval, generate and info read it like a run.

    The file holds no path of this machine: of the training text it keeps the hash. Raises UserError if the run cannot
    be read, out exists or cannot be written.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file, exported already; give the folder of a run.")
    if out.exists():
        raise UserError(f"{out} exists already; choose another file, or remove it.")
    loaded = load_model(folder, checkpoint_name, ema=ema)
    tensors = tensors_of(loaded.model)
    threshold = loaded.run.model.ternary_threshold
    tensors |= {name: ternarize(tensors[name], threshold=threshold) for name in packed.TERNARY}
    start = loaded.run.training.embedding_init
    if start not in ("corpus", "random") and not start.startswith("hf:"):
        start = Path(start).name  # of a path on this machine
    training = dataclasses.replace(loaded.run.training, embedding_init=start)
    run = dataclasses.replace(loaded.run, data="", training=training)
    state = {name: loaded.state[name] for name in ("step", "tokens", "seconds")} | {"ema": ema}
    packed.write(out, tensors, run.to_json(), state)
    return out


def describe_run(folder: Path, checkpoint_name: str | None = None) -> dict[str, Any]:
    """What `info` shows: parameters by group, sizes, the tree's shape, how far the run was trained."""
    loaded = load_model(folder, checkpoint_name)
    run, parameters = loaded.run, loaded.model.parameters
    groups: dict[str, int] = {}
    for name, value in parameters.items():
        group = name.split(".")[0]
        group = "norms" if group in ("norm1", "norm2", "final_norm") else group
        groups[group] = groups.get(group, 0) + value.size
    ternary = sum(parameters[name].size for name in packed.TERNARY)
    path = folder if folder.is_file() else checkpoint.find(folder, checkpoint_name)
    files = [path] if path.is_file() else list(path.iterdir())
    peak = peak_rss_mb()
    return {
        "run": str(folder),
        "recipe": run.recipe,
        "head": run.head.name,
        "activations": run.model.activations,
        "parameters": sum(value.size for value in parameters.values()),
        "parameters_by_group": groups,
        "ternary_parameters": ternary,
        "bytes": {
            "float32": 4 * sum(value.size for value in parameters.values()),
            "ternary_packed": -(-ternary // 4),  # 2 bits a weight
            "exported" if path.is_file() else "checkpoint": sum(file.stat().st_size for file in files),
        },
        "peak_memory_mb": None if peak is None else round(peak),  # of this process, with the model loaded
        "tree": _describe_tree(loaded),
        "receptive_field": run.model.receptive_field,
        "checkpoint": path.name,
        "trained": {
            "running_average": bool(loaded.state.get("ema")),  # an exported one
            "steps": loaded.state["step"],
            "planned_steps": run.plan.steps,
            "tokens": loaded.state["tokens"],
            "seconds": round(loaded.state["seconds"], 1),
        },
        "data": run.data,
    }


def _describe_tree(loaded: Loaded) -> dict[str, Any] | None:
    """The tree's shape; its expected cost by the training text's counts, where that is still there."""
    if not isinstance(loaded.model.head, TreeHead):
        return None
    counts = None
    if loaded.run.data:  # an exported model does not say where its text is
        with contextlib.suppress(UserError):
            data = open_tokens(Path(loaded.run.data))
            if data.hash == loaded.run.data_hash:
                counts = data.train.counts(loaded.run.model.vocab_size)
    description = loaded.model.head.tree.describe(counts)
    if counts is None:  # then nothing is known of how often a token occurs
        description = {name: value for name, value in description.items() if not name.startswith("expected")}
    return description


def vocabulary_of(run: RunConfig) -> Vocabulary:
    """The vocabulary that a run's model reads and writes: its training text's, by the manifest where that is there.

    Without the text, as with an exported model, it is the first of VOCABULARIES that has as many tokens as the model:
    the settings do not name it. Raises UserError if there is none.
    """
    if run.data:
        with contextlib.suppress(UserError):
            manifest = Manifest.read(Path(run.data) / MANIFEST)
            if manifest.hash == run.data_hash:
                return manifest.vocabulary
    for name in VOCABULARIES:
        vocabulary = vocabulary_named(name)
        if vocabulary.size == run.model.vocab_size:
            return vocabulary
    raise UserError(
        f"No vocabulary here has the model's {run.model.vocab_size:,} tokens, and the training text, which names it, "
        "is gone; put the text back where it was."
    )


def with_vocabulary_of(data: TokenData, run: RunConfig) -> RunConfig:
    """The run with a model of the data's vocabulary, unless --set asked for another size, which check() refuses."""
    if run.model.vocab_size != ModelConfig.vocab_size:
        return run
    return dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=data.vocabulary.size))


def check(run: RunConfig, data: TokenData) -> None:
    """Raise UserError unless the model and the data fit together."""
    size = data.vocabulary.size
    if run.model.vocab_size != size:
        raise UserError(
            f"The tokens in {data.folder} have a vocabulary of {size:,}, but model.vocab_size is "
            f"{run.model.vocab_size:,}; leave that setting out."
        )
    longest = max(phase.seq_len for phase in run.training.phases)
    if data.train.n_tokens <= longest:
        raise UserError(
            f"The training text in {data.folder} has {data.train.n_tokens:,} tokens, and a sequence of {longest} needs "
            f"{longest + 1:,}; use more text, or shorter sequences, such as --set phases=16x32."
        )
    start = run.training.embedding_init
    if run.head.name == "tree":
        rows = start != "random" and _by_meaning(run.head)
        check_shape(run.head.tree, _tree_options(run.head), rows=rows, prefix="tree_")
    if start not in ("corpus", "random") and not start.startswith("hf:") and not Path(start).is_file():
        raise UserError(f"There is no file {start} to start the embedding from; give a GPT-2 .safetensors file.")


def training_data(source: str | None, note: Note) -> Path:
    """The prepared folder to train on: the one named, or the built-in text's in the cache.

    Preparing runs in a process of its own, so that training does not keep the memory it took.
    """
    if source is not None:
        folder = Path(source)
        if not folder.exists():
            raise UserError(f"There is no folder {source}; make one with `flashlm-numba prepare SOURCE --out DIR`.")
        if not folder.is_dir():
            raise UserError(
                f"{source} is not a prepared folder; first run `flashlm-numba prepare {source} --out DIR`, "
                "then train on DIR."
            )
        return folder
    if cached_corpus() is None:
        place, usual = writable_cache(), cache_roots()[0]
        if place != usual:
            note(f"The cache folder {usual} cannot be written, so {place} is used, which may be gone tomorrow.")
        note("Preparing the built-in text, this first time ...")
        run_apart(["-m", "flashlm_numba", "prepare"])
    return default_corpus()


def new_model(
    run: RunConfig, data: TokenData, note: Note, meanwhile: Callable[[], None] = lambda: None
) -> tuple[Model, float]:
    """A model before its first step, a pure function of the settings and the data, and the seconds it took.

    meanwhile : called while another process makes the start of the embedding, where that has to be made, and not
        counted in the seconds; a start out of the cache counts with the seconds that it once took, so that a run's
        clock does not depend on what ran before it
    """
    counts = data.train.counts(run.model.vocab_size)
    log_prior = None
    if run.head.log_prior:  # of counts plus one: every token can occur
        log_prior = np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)
    with ThreadPoolExecutor(1) as waiting:
        start = waiting.submit(_embedding_start, run, data, note)
        meanwhile()
        rows, seconds = start.result()  # rows by token id
    began = time.perf_counter()
    tree = None
    if run.head.name == "tree":
        tree = _build_tree(run.head, counts, rows)
        if rows is not None:
            rows = rows[tree.token_of_row]
    parameters = initial_parameters(run.model, run.seed, rows)
    rank = run.head.tree_rank
    if tree is not None and rank is None:
        rank = default_rank(run.head.tree, tree, run.model.dim)
    model = Model(run.model, parameters, _head_maker(run.head, tree, log_prior, counts=counts, rank=rank))
    return model, seconds + time.perf_counter() - began


def model_from(run: RunConfig, tensors: dict[str, np.ndarray], counts: np.ndarray | None = None) -> Model:
    """A model from the tensors of model.safetensors; UserError if they are not of these settings.

    counts (V,): of the training text, needed to train on; without them the sampled head is a dense one.
    """
    try:
        tree = Tree.from_tensors(tensors) if run.head.name == "tree" else None
        rows = {"nodes": tensors.get("head.nodes.weight"), "basis": tensors.get("head.nodes.basis")}
        return Model(run.model, tensors, _head_maker(run.head, tree, tensors.get("log_prior"), counts=counts, **rows))
    except (ValueError, KeyError, OverflowError) as error:
        raise UserError(f"The weights do not fit the settings beside them ({error}); restore the file.") from None


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """What model.safetensors holds: the parameters, and what of the head is fixed but comes from the data."""
    tensors = dict(model.parameters)
    head: Any = model.head
    if head.log_prior is not None:
        tensors["log_prior"] = head.log_prior
    if isinstance(head, TreeHead):
        tensors |= head.tree.to_tensors()
    return tensors


def _head_maker(
    head: HeadConfig,
    tree: Tree | None,
    log_prior: np.ndarray | None,
    *,
    counts: np.ndarray | None = None,
    **nodes: Any,
) -> Callable[[np.ndarray, np.ndarray], Any]:
    """The function that builds the head on the live embedding and its gradient, both in the head's row order.

    counts (V,) of the training text: the sampled head draws by them, and they weigh the rows below a node in its start,
    where there are no node rows yet.  nodes : TreeHead's rank, nodes and basis
    """
    options: dict[str, Any] = {
        "label_smoothing": head.label_smoothing,
        "z_loss": head.z_loss,
        "soft_cap": head.soft_cap,
        "log_prior": log_prior,
    }
    if head.name == "sampled" and counts is not None:
        options |= {"counts": counts, "candidates": head.num_sampled}
        return lambda weight, dweight: SampledHead(weight, dweight, **options)
    if tree is None:
        return lambda weight, dweight: DenseHead(weight, dweight, **options)
    return lambda weight, dweight: TreeHead(tree, weight, dweight, counts=counts, **nodes, **options)


def _embedding_start(run: RunConfig, data: TokenData, note: Note) -> tuple[np.ndarray | None, float]:
    """Rows (V, C) float32 by token id to start the embedding from, or None for random ones; the seconds it took."""
    start, config = run.training.embedding_init, run.model
    if start == "random":
        return None, 0.0
    if start == "corpus":
        from flashlm_numba.model import embedding_init

        return embedding_init.cached_start(data, config.dim, threads=run.threads, report=note)
    from flashlm_numba.model import pretrained

    began = time.perf_counter()
    rows, kept = pretrained.from_gpt2(start, config.dim, config.vocab_size)
    note(f"The embedding starts from {start}, cut to {config.dim} dimensions: {kept:.1%} of its variance.")
    return rows, time.perf_counter() - began


def _build_tree(head: HeadConfig, counts: np.ndarray, rows: np.ndarray | None) -> Tree:
    """The label tree that the settings ask for; counts (V,), rows (V, C) by token id."""
    return build_tree(head.tree, counts, rows=rows if _by_meaning(head) else None, **_tree_options(head))


def _tree_options(head: HeadConfig) -> dict[str, int]:
    """The options of build_tree that the settings give."""
    options = {
        "root_tokens": head.tree_root_tokens,
        "clusters": head.tree_clusters,
        "classes": head.tree_classes,
        "arity": head.tree_arity,
    }
    return {name: value for name, value in options.items() if value is not None}


def _by_meaning(head: HeadConfig) -> bool:
    """Whether the tree's builder is given the rows that the embedding starts from."""
    return head.tree_clustering == "embedding" or head.tree == "clustered"
