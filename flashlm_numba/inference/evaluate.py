"""Scoring text: the rule behind every NLL that this project reports.

Every token of every document is scored once. The first token is predicted from the end of text; the end of text that
closes the document is not scored. No context crosses a document border. Long documents are scored in windows that
overlap by the model's receptive field; where it is not finite, each window continues with the state of the one before.
A token's score therefore depends neither on the window size nor on the rest of the batch, except for rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numba
import numpy as np

from flashlm_numba.memory.counting import count_tokens
from flashlm_numba.memory.gate import Recalled
from flashlm_numba.memory.ngrams import FixedMemory, Memory
from flashlm_numba.model.packed_model import PackedModel
from flashlm_numba.system.display import TERMINAL, Note, Progress
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data.shards import Split
    from flashlm_numba.data.tokenizer import Vocabulary
    from flashlm_numba.model.config import RunConfig
    from flashlm_numba.model.model import Model

WINDOW = 2_048  # positions per window, overlap included
BATCH = 4_096  # positions per batch
THREADS_PER_WINDOW = 16  # that a window keeps busy: the channel groups of a convolution
SMOOTHING = 0.1  # label smoothing of --smoothed, as in FlashLM v3's published losses
_NAME_TOKENS = "name the folder of its tokens with --data DIR"
_POOL = 128  # windows that are sorted by length and then divided into batches
_SMOOTHED_ROWS = 64  # rows per (rows, V) table of probabilities


@dataclass(frozen=True)
class CountedMemory:
    """A memory beside a model that was trained without one: n-grams counted anew, with the same share everywhere.

    least : n-grams of three and more tokens that occur less often are left out
    share : of the memory in the mixture, from 0 to 1; the default is the best single one on the textbooks
    """

    least: int = 1
    share: float = 0.4


@dataclass(frozen=True)
class Scores:
    """Sums over the scored tokens."""

    tokens: int
    nll: float  # sum of -ln p(token), nats; of the mixture, if there is a memory
    spread: float | None = None  # sum over tokens of the mean of -ln p over all V tokens; None unless asked for
    head_nll: float | None = None  # as nll, of the head alone, and
    memory_nll: float | None = None  # of the memory alone; None without a memory

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL."""
        return math.exp(self.mean_nll) if self.mean_nll < 700 else math.inf

    @property
    def smoothed_loss(self) -> float | None:
        """Mean cross-entropy against targets smoothed by SMOOTHING over all V tokens, nats per token."""
        if self.spread is None:
            return None
        return ((1 - SMOOTHING) * self.nll + SMOOTHING * self.spread) / self.tokens

    def bits_per_byte(self, utf8_bytes: int) -> float:
        """The summed NLL in bits, divided by the UTF-8 bytes of the documents."""
        return self.nll / (math.log(2) * utf8_bytes)


@dataclass(frozen=True)
class Window:
    """Part of a document as the model reads it. The predictions at positions `skip` and later are scored."""

    ids: np.ndarray  # (L,) int32 inputs
    targets: np.ndarray  # (L,) int32
    skip: int  # positions scored by an earlier window
    recalled: Recalled | None = None  # what a memory says of the targets
    copies: np.ndarray | None = None  # (L, O) int32: from Model.copied
    document: int = 0  # number of the document


def windows(
    document: np.ndarray,
    field: int | None,
    window: int,
    eot: int,
    memory: Memory | None = None,
    copied: Callable[[np.ndarray], np.ndarray | None] = lambda ids: None,
    number: int = 0,
) -> Iterator[Window]:
    """Divide one document (n,) into windows of at most `window` positions that score each token exactly once.

    field : the model's receptive field in tokens, the current one included. A later window starts field - 1 positions
        before the first position that it scores, so it contains the receptive field of every scored position. None:
        windows follow one another, to be read with one state.
    memory : tells every window about its targets;  copied : Model.copied;  number : of the document

    >>> [(len(w.ids), w.skip) for w in windows(np.arange(10, dtype=np.int32), field=3, window=6, eot=99)]
    [(6, 0), (6, 2)]
    """
    field = 1 if field is None else field
    if window < field:
        raise ValueError(f"windows: window must be at least the receptive field {field}, got {window}")
    targets = np.asarray(document, np.int32)
    ids = np.concatenate([np.array([eot], np.int32), targets[:-1]])
    known = memory.recall(targets) if memory else None
    copies = copied(ids[None])  # of the document, whose windows need not hold what is copied
    start, scored = 0, 0
    while scored < len(targets):
        end = min(start + window, len(targets))
        recalled = None if known is None else known.at(slice(start, end))
        seen = None if copies is None else copies[start:end]
        yield Window(ids[start:end], targets[start:end], scored - start, recalled, seen, number)
        scored = end
        start = end - (field - 1)


def score(
    model: Model,
    documents: Iterable[np.ndarray],
    *,
    eot: int,
    smoothed: bool = False,
    window: int = WINDOW,
    batch: int = BATCH,
    memory: Memory | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Score documents of token ids (n,) with a model.

    eot : id of the end of text;  smoothed : also sum -ln p over all V tokens (slow: V values per position)
    window, batch : positions per window and per batch; they change the result only by rounding
    memory : whose mixture with the head is scored; default: the model's own, if it has one
    progress : called with the number of tokens just scored
    The cost is a forward pass over L / (L - field + 1) times the tokens, where L is the window.
    """
    model.sync_weights()
    memory = memory or model.memory
    tokens, nll, spread, head_nll, memory_nll = 0, 0.0, 0.0, 0.0, 0.0

    def count(h: np.ndarray, items: list[Window]) -> None:
        """h (n, C), the scored positions of these windows"""
        nonlocal tokens, nll, spread, head_nll, memory_nll
        want = np.concatenate([item.targets[item.skip :] for item in items])
        copies = _copies_of(items)
        log_prob = model.log_prob(h, want, copies=copies)
        if smoothed:
            spread += _spread(model, h, copies)
        known = _recalled_of(items)
        if memory is not None and known is not None:
            head_nll -= float(np.sum(log_prob, dtype=np.float64))
            memory_nll -= float(np.sum(np.log(known.probability), dtype=np.float64))
            log_prob = memory.mixed(h, log_prob, known)
        nll -= float(np.sum(log_prob, dtype=np.float64))
        tokens += len(want)
        if progress is not None:
            progress(len(want))

    _read(model, documents, count, eot, memory, window, batch)
    return Scores(tokens, nll, spread if smoothed else None, *((head_nll, memory_nll) if memory else ()))


def document_nll(
    model: Model | PackedModel,
    documents: Sequence[np.ndarray],
    *,
    eot: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Score each document (n,) by itself: the sum of -ln p over its tokens, (D,) float64, nats.

    The rule, and the batches, are those of score(). progress : called with the number of tokens just scored
    """
    model.sync_weights()
    nll = np.zeros(len(documents))

    def count(h: np.ndarray, items: list[Window]) -> None:
        targets = np.concatenate([item.targets[item.skip :] for item in items])
        log_prob = model.log_prob(h, targets, _recalled_of(items), _copies_of(items))
        ends = np.cumsum([len(item.targets) - item.skip for item in items])
        for item, part in zip(items, np.split(log_prob, ends[:-1]), strict=True):
            nll[item.document] -= float(np.sum(part, dtype=np.float64))
        progress(len(targets))

    _read(model, documents, count, eot, model.memory)
    return nll


def _read(
    model: Model | PackedModel,
    documents: Iterable[np.ndarray],
    count: Callable[[np.ndarray, list[Window]], None],
    eot: int,
    memory: Memory | None,
    window: int = WINDOW,
    batch: int = BATCH,
) -> None:
    """Call count with some windows and the hidden states (n, C) of their scored positions until all have been read."""
    field = model.config.receptive_field
    window = max(window, 2 * (field or 0))
    least = -(-numba.get_num_threads() // THREADS_PER_WINDOW)

    def in_batches() -> Iterator[Window]:
        for number, document in enumerate(documents):
            if field is None and (len(document) > window or isinstance(model, PackedModel)):
                for h, item in _continued(model, document, window, eot, memory, number):
                    count(h, [item])
            else:
                yield from windows(document, field, window, eot, memory, model.copied, number)

    for group in _batches(in_batches(), batch, least, window):
        length = padded_length(max(len(w.ids) for w in group), window)
        ids = np.full((len(group), length), eot, np.int32)  # padding at the end is harmless in a causal model
        rows = []
        for row, item in enumerate(group):
            ids[row, : len(item.ids)] = item.ids
            rows.append(np.arange(item.skip, len(item.ids)) + row * length)
        count(cast("Model", model).forward(ids)[np.concatenate(rows)], group)


def _continued(
    model: Model | PackedModel,
    document: np.ndarray,
    window: int,
    eot: int,
    memory: Memory | None = None,
    number: int = 0,
) -> Iterator[tuple[np.ndarray, Window]]:
    """The windows of a document with their hidden states (L, C), each read with the state of the one before."""
    state = model.new_state()
    for item in windows(document, None, window, eot, memory, model.copied, number):
        yield model.read(state, item.ids), item


def read_document(
    model: Model | PackedModel, document: np.ndarray, *, eot: int, window: int = WINDOW
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read one document part by part: the hidden states (n, C) that predict the next tokens, these tokens (n,) int32,
    and ln p of each (n,) float64.

    If parameters have changed, call sync_weights first. The first token is predicted from eot.
    window : positions per part, or more where the model's receptive field is finite
    """
    field = model.config.receptive_field
    pieces: Iterable[tuple[np.ndarray, Window]]
    if field is None:
        pieces = _continued(model, document, window, eot, model.memory)
    else:
        whole = cast("Model", model)
        parts = windows(document, field, max(window, 2 * field), eot, model.memory, whole.copied)
        pieces = ((whole.forward(part.ids[None])[part.skip :], part) for part in parts)
    for h, item in pieces:
        recalled = None if item.recalled is None else item.recalled.at(slice(item.skip, None))
        targets = item.targets[item.skip :]
        yield h, targets, model.log_prob(h, targets, recalled, _copies_of([item])).astype(np.float64)


def token_nll(model: Model | PackedModel, document: np.ndarray, *, eot: int) -> np.ndarray:
    """-ln p of each token of one document (n,), in order, (n,) float64, nats. The rule is that of score()."""
    model.sync_weights()
    found = [-log_prob for _, _, log_prob in read_document(model, document, eot=eot)]
    return np.concatenate(found) if found else np.empty(0)


def _copies_of(items: list[Window]) -> np.ndarray | None:
    """What is copied at the scored positions of some windows, (N, O), or None."""
    parts = [item.copies[item.skip :] for item in items if item.copies is not None]
    return np.concatenate(parts) if parts else None


def _recalled_of(items: list[Window]) -> Recalled | None:
    """What a memory says of the scored targets of some windows, or None."""
    parts = [item.recalled.at(slice(item.skip, None)) for item in items if item.recalled is not None]
    return Recalled(*map(np.concatenate, zip(*parts, strict=True))) if parts else None


def padded_length(length: int, window: int) -> int:
    """The length that windows of up to `window` positions are padded to: few different ones, so that the model can use
    its buffers again. It is at most a sixteenth more, and 16 positions.

    >>> padded_length(100, 2048), padded_length(3000, 4096), padded_length(2047, 2047)
    (112, 3072, 2047)
    """
    step = max(16, 1 << max(0, length.bit_length() - 5))
    return min(-(-length // step) * step, window)


def _batches(items: Iterator[Window], positions: int, least: int, window: int) -> Iterator[list[Window]]:
    """Groups of windows of similar length, of at most `positions` padded positions or of `least` windows."""
    pool: list[Window] = []
    more = True
    while more:
        pool = []
        for item in items:
            pool.append(item)
            if len(pool) == _POOL:
                break
        more = len(pool) == _POOL
        pool.sort(key=lambda item: len(item.ids))
        while pool:
            longest = padded_length(len(pool[-1].ids), window)
            count = min(len(pool), max(least, positions // longest))
            yield pool[-count:]
            del pool[-count:]


def is_causal(model: Model, length: int = 256) -> bool:
    """Whether changing a token anywhere in a text changes no bit of an earlier hidden state.

    The text has 16 distinct tokens, and only two in its first half, so that every position has an n-gram to copy.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, 16)
    ids = rng.choice(tokens, (1, length)).astype(np.int32)
    ids[0, : length // 2] = rng.choice(tokens[:2], length // 2)
    before = model.forward(ids).copy()
    for at in (1, *range(length // 4, length // 4 + 8), length // 3, length // 2, length - 1):
        changed = ids.copy()
        changed[0, at:] = rng.choice(tokens, length - at)
        if not np.array_equal(model.forward(changed)[:at].view(np.uint32), before[:at].view(np.uint32)):
            return False
    return True


def check_causal(model: Model, run: Path) -> None:
    """Raise UserError if a later token changes the prediction of an earlier one."""
    if not is_causal(model):
        raise UserError(
            f"In the model of {run} a later token changes the prediction of an earlier one, so its NLL would be "
            "meaningless. The kernels must be wrong on this machine; run `flashlm-numba doctor`."
        )


def _spread(model: Model, h: np.ndarray, copies: np.ndarray | None) -> float:
    """Mean of -ln p over all V tokens, summed over the rows of h (N, C), where copies (N, O) are copied."""
    total = 0.0
    for start in range(0, len(h), _SMOOTHED_ROWS):
        some = slice(start, start + _SMOOTHED_ROWS)
        p = model.head_at(None if copies is None else copies[some]).distribution(h[some])  # (rows, V)
        # a probability that underflowed counts as the smallest float32, e**-103
        np.maximum(p, np.float32(1e-45), out=p)
        total -= float(np.log(p, out=p).mean(axis=1, dtype=np.float64).sum())
    return total


def evaluate_run(
    run: Path,
    data: str | None = None,
    *,
    smoothed: bool = False,
    ema: bool = False,
    checkpoint_name: str | None = None,
    activations: str | None = None,
    subset: str | None = None,
    column: str = "text",
    lines: bool = False,
    skip_missing: bool = False,
    own_data: Path | None = None,
    memory: CountedMemory | None = None,
    alone: bool = False,
    progress: Progress = TERMINAL,
) -> dict[str, Any]:
    """Score a run's model. Returns the object that `eval --json` prints.

    data : a prepared folder, whose validation documents are scored, or a source that `prepare` takes. In a source the
        files named as validation are scored, or all documents if there are none. None: the validation documents of
        the data that the run was trained on.
    activations : "float" or "int8", as in Model.use_activations; None: as the run was trained
    subset, column, lines, skip_missing : options of a source, as in `prepare`;  progress : as in load_model
    own_data : folder of the data that the run was trained on, if they have moved; instead of data, unless there is a
        memory
    memory : also score the mixture with n-grams of the text that the run was trained on, for a run without a memory
    alone : score the head without the run's memory
    Raises UserError if the run, its checkpoint or the data cannot be used, or if the data hold no text.
    """
    from flashlm_numba.data.builtin import open_run_tokens
    from flashlm_numba.data.shards import is_prepared, open_tokens
    from flashlm_numba.model.build import load_model
    from flashlm_numba.system.display import Display

    uses = ["score", *["whole"] * smoothed, *["memory"] * (memory is not None), *filter(None, [activations])]
    loaded = load_model(run, checkpoint_name, ema=ema, uses=uses, progress=progress)
    activations = activations or loaded.run.model.activations
    loaded.model.use_activations(activations)
    check_causal(loaded.model, run)
    if memory is not None and not loaded.run.data_hash:
        raise UserError(f"{run} was imported, and its training text is not known; leave out --memory.")
    if (lost := loaded.vocabulary.lost()) is not None:
        progress.note(
            f"The tokenizer of {run} does not keep every text ({lost[0]!r} comes back as {lost[1]!r}), so its bits per "
            "byte are too low where that is lost."
        )
    if alone:
        loaded.model.memory = None
    elif memory is not None and loaded.model.memory is not None:
        raise UserError(f"{run} has a memory of its own, which is mixed in anyway; leave out --memory.")
    vocabulary = loaded.vocabulary
    sizes = {"documents": 0, "bytes": 0}
    total = None
    if (subset is not None or lines or skip_missing or column != "text") and (data is None or is_prepared(data)):
        raise UserError("subset, lines, column and skip_missing apply to a source; leave them out for prepared data.")
    if data is None or is_prepared(data):
        advice = _NAME_TOKENS if memory else f"name the text to score: `flashlm-numba eval {run} DATA`"
        where = data or str(own_data or _own_data(run, loaded.run, advice))
        tokens = open_run_tokens(where, run, loaded.run.data_hash) if data is None else open_tokens(where)
        if tokens.vocabulary.hash != vocabulary.hash:
            raise UserError(
                f"The tokens in {where} use the vocabulary {tokens.vocabulary.name}, but {run} was trained with "
                f"{vocabulary.name}; name the original text to score."
            )
        tokens.verify("validation")
        split = tokens.validation
        sizes = {"documents": split.n_documents, "bytes": split.n_bytes}
        documents, total, name = split.documents(), split.n_text_tokens, f"{where} (validation)"
    else:
        if (Path(data) / "config.json").exists():
            raise UserError(f"{data} is a run, not a text; name the text to score.")
        options = {"subset": subset, "column": column, "lines": lines, "skip_missing": skip_missing}
        documents, name = _source_documents(data, sizes, vocabulary, progress.note, **options), data
    beside: Memory | None = loaded.model.memory
    told: dict[str, float | None] = {"weight": None, "seconds": None}
    if memory is not None:  # last, since it takes long
        trained_on = own_data or _own_data(run, loaded.run, _NAME_TOKENS)
        text = open_run_tokens(trained_on, run, loaded.run.data_hash)
        text.verify("train")
        ngrams, seconds = count_tokens(text, memory.least, progress)
        beside = FixedMemory(ngrams, memory.share)
        told = {"weight": memory.share, "seconds": seconds}
    with Display() as display, display.tokens("scoring", total):
        found = score(
            loaded.model,
            documents,
            eot=vocabulary.start,
            smoothed=smoothed,
            memory=beside,
            progress=lambda count: display.advance(count),
        )
    if not found.tokens:
        raise UserError(f"{name} holds no text to score.")
    if not math.isfinite(found.nll):
        raise UserError(
            f"The NLL of {name} is {found.nll}: the model's weights are too large; use an earlier checkpoint."
        )
    # beside a run without a memory the mixture is reported apart
    main = found if memory is None or found.head_nll is None else replace(found, nll=found.head_nll)
    return {
        "nll": main.mean_nll,
        "perplexity": main.perplexity if math.isfinite(main.perplexity) else None,  # JSON has no infinity
        "bits_per_byte": main.bits_per_byte(sizes["bytes"]),
        "smoothed_loss": main.smoothed_loss,
        "tokens": found.tokens,
        **sizes,
        "data": name,
        "checkpoint_step": loaded.state["step"],
        "ema": ema or bool(loaded.state.get("ema")),
        "activations": activations,
        "rows": loaded.state.get("rows", "float"),  # arithmetic of the embedding's rows
        "vocabulary": vocabulary.name,
        "causal": True,  # a model that is not causal gets no score
        **({"memory": _with_memory(found, sizes["bytes"], beside, told)} if beside else {}),
    }


def _with_memory(found: Scores, utf8_bytes: int, memory: Memory, more: dict[str, Any]) -> dict[str, Any]:
    """NLL and bits per byte of the mixture, of the head and of the memory alone, and what the memory is."""
    assert found.head_nll is not None
    assert found.memory_nll is not None
    scores: dict[str, Any] = {}
    for prefix, nll in (("", found.nll), ("head_", found.head_nll), ("alone_", found.memory_nll)):
        part = Scores(found.tokens, nll)
        scores |= {f"{prefix}nll": part.mean_nll, f"{prefix}bits_per_byte": part.bits_per_byte(utf8_bytes)}
    return scores | memory.describe() | more


def _own_data(run: Path, config: RunConfig, advice: str) -> str:
    """The prepared folder that a run was trained on. An exported model records only the hash of its tokens; if it is
    the hash of the built-in text, that folder is returned.

    advice : for the message
    """
    from flashlm_numba.data.builtin import cached_corpus
    from flashlm_numba.data.shards import open_tokens

    if config.data:
        return config.data
    built_in = cached_corpus()
    if built_in is not None and open_tokens(built_in).hash == config.data_hash:
        return str(built_in)
    raise UserError(f"{run} does not say where its text is; {advice}.")


def _source_documents(
    source: str, sizes: dict[str, int], vocabulary: Vocabulary, note: Note, **options: Any
) -> Iterator[np.ndarray]:
    """Token ids (n,) int32 of each document of a source; adds documents and UTF-8 bytes to sizes.

    options : arguments of sources.resolve
    Raises UserError at once if the source cannot be found.
    """
    from flashlm_numba.data.sources import resolve

    found = resolve(source, **options)
    vocabulary.load()
    roles = ("validation",) if "validation" in found.roles else found.roles

    def documents() -> Iterator[np.ndarray]:
        for text in itertools.chain.from_iterable(found.documents(role, note=note) for role in roles):
            if not text or text.isspace():  # as in `prepare`
                continue
            ids = np.array(vocabulary.encode(text), np.int32)
            if len(ids):
                sizes["documents"] += 1
                sizes["bytes"] += len(text.encode("utf-8", "surrogatepass"))
                yield ids

    return documents()


def validation_subset(split: Split, tokens: int) -> list[np.ndarray]:
    """A fixed subset of a split's documents, of at most `tokens` tokens, for validation during training.

    It takes the documents of the split's first million tokens in a random order (seed 0), each cut to an eighth of the
    subset so that it holds several documents. Label its NLL as that of the subset, not of the split.
    """
    documents = list(split.documents(max_tokens=max(1_000_000, tokens)))
    order = np.random.default_rng(0).permutation(len(documents))
    subset: list[np.ndarray] = []
    left = tokens
    for share in (
        max(1, tokens // 8),
        tokens,
    ):  # if the first pass leaves room, a second one takes complete documents
        subset, left = [], tokens
        for index in order:
            part = documents[index][: min(share, left)]
            if len(part):
                subset.append(part)
                left -= len(part)
        if left == 0:
            break
    return subset
