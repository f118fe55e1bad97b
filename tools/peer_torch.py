"""FlashLM v3 trained and timed in PyTorch: the peer of the benchmarks. The program never uses it.

    python tools/peer_torch.py head                      linear + cross-entropy, and the adaptive head
    python tools/peer_torch.py trunk                     hidden states, forward and backward
    python tools/peer_torch.py step                      a whole training step, and the share of each part
    python tools/peer_torch.py train DATA --minutes 10   training on prepared shards (`flashlm-numba prepare`)

Needs the extra `peer` (pip install -e '.[peer]'). Every result is one JSON object on a line. The model
is in peer_model.py, its heads in peer_heads.py, its optimisers in peer_optim.py.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.kernels.ngram_copy import ngram_copies
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.system.display import peak_rss_mb
from flashlm_numba.system.threads import available_cores
from tools import timing
from tools.peer_heads import frequency_ranks, head_candidates
from tools.peer_model import PeerModel
from tools.peer_optim import Optimizers, parameter_groups, schedule

if TYPE_CHECKING:
    from flashlm_numba.data.shards import Split

EOT = 50_256  # GPT-2's <|endoftext|>


# ------------------------------------------------------------------------------------- training and scoring


def training_step(
    model: PeerModel,
    optimizers: Optimizers,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    positions: float = 1.0,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    clock: dict[str, float] | None = None,
    **options: Any,
) -> float:
    """One optimiser step on micro-batches of ids and targets (B, T); returns the mean training loss.

    positions : share of the positions, drawn at random, that the loss is taken at
    scale : factor on the learning rates;  options : those of dense_loss
    clock : seconds are added to its keys "trunk", "head" and "optimizer"
    """
    clock = {} if clock is None else clock
    optimizers.zero_grad()
    total = 0.0
    for ids, targets in batches:
        start = time.perf_counter()
        h, y = model.hidden(ids), targets.flatten()
        if positions < 1:
            kept = torch.randperm(len(y), generator=generator)[: max(1, round(positions * len(y)))]
            h, y = h[kept], y[kept]
        cut = h.detach().requires_grad_()  # two graphs, so that trunk and head are timed apart
        middle = time.perf_counter()
        loss, _ = model.losses(cut, y, want_nll=False, **options)
        mean = loss.mean() / len(batches)
        mean.backward()
        total += mean.item()
        late = time.perf_counter()
        h.backward(cut.grad)
        end = time.perf_counter()
        clock["head"] = clock.get("head", 0.0) + late - middle
        clock["trunk"] = clock.get("trunk", 0.0) + (middle - start) + (end - late)
    start = time.perf_counter()
    optimizers.step(scale)
    clock["optimizer"] = clock.get("optimizer", 0.0) + time.perf_counter() - start
    return total


def scored_windows(document: np.ndarray, context: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Windows of a document (n,) that score each of its tokens once: inputs (t,), targets (t,), first scored.

    The first token is predicted from <|endoftext|>. Windows have at most `length` inputs and overlap by
    `context` (receptive field - 1) of them, which see the same past in every window, so that the result does
    not depend on `length`.
    """
    if length <= context:
        raise ValueError(f"windows of {length} tokens leave none to score after {context} of context")
    inputs = np.concatenate([[EOT], document[:-1]]).astype(np.int64)
    done = 0
    while done < len(document):
        start = max(0, done - context)
        end = min(start + length, len(document))
        yield inputs[start:end], document[start:end].astype(np.int64), done - start
        done = end


@torch.no_grad()
def score(
    model: PeerModel,
    split: Split,
    *,
    max_tokens: int | None = None,
    length: int = 1024,
    rows: int = 8,
    log_prior: Tensor | None = None,
    soft_cap: float | None = None,
) -> dict[str, float | int]:
    """NLL of a split by the rule of `flashlm-numba eval`: "nll", "tokens"; of a whole split "bits_per_byte".

    Every token of every document once, contexts inside documents. max_tokens takes the first ones only.
    """
    context = model.config.receptive_field - 1
    length = max(length, 2 * context)
    options: dict[str, Any] = {} if model.adaptive is not None else {"log_prior": log_prior, "soft_cap": soft_cap}
    windows = [w for d in split.documents(max_tokens) for w in scored_windows(d, context, length)]
    windows.sort(key=lambda w: -len(w[0]))  # little padding, which stands at the end and is never looked at
    total, count = 0.0, 0
    for low in range(0, len(windows), rows):
        part = windows[low : low + rows]
        ids = np.full((len(part), len(part[0][0])), EOT % model.config.vocab_size)
        for row, (inputs, _, _) in zip(ids, part, strict=True):
            row[: len(inputs)] = inputs
        hidden = model.hidden(torch.from_numpy(ids)).view(*ids.shape, -1)
        h = torch.cat([hidden[i, first : len(x)] for i, (x, _, first) in enumerate(part)])
        y = torch.from_numpy(np.concatenate([y[first:] for _, y, first in part]))
        for chunk in range(0, len(y), 512):
            nll = model.losses(h[chunk : chunk + 512], y[chunk : chunk + 512], **options)[1]
            assert nll is not None
            total += float(nll.double().sum())
        count += len(y)
    result: dict[str, float | int] = {"nll": total / max(1, count), "tokens": count}
    if max_tokens is None:
        result["bits_per_byte"] = total / (math.log(2) * max(1, split.n_bytes))
    return result


@dataclass(frozen=True)
class Phase:
    """Batches of a stretch of training."""

    last_step: int | None  # the phase ends after this step; None: never
    rows: int  # sequences in a micro-batch
    length: int  # tokens in a sequence
    grad_accum: int  # a step

    @staticmethod
    def parse(text: str) -> tuple[Phase, ...]:
        """Phases from "1000:4x64x4,4000:4x128x4" or a single "16x128": [last step:]rows x length [x micro].

        >>> Phase.parse("16x128")
        (Phase(last_step=None, batch_size=16, seq_len=128, grad_accum=1),)
        """
        phases = []
        for part in text.split(","):
            last, _, shape = part.rpartition(":")
            sizes = [int(n) for n in shape.split("x")]
            if len(sizes) not in (2, 3) or min(sizes) < 1:
                raise ValueError(f"a phase is [LAST_STEP:]ROWSxLENGTH[xMICRO_BATCHES], got {part!r}")
            phases.append(Phase(int(last) if last else None, sizes[0], sizes[1], *(sizes[2:] or [1])))
        return tuple(phases)


V3_PHASES = "1000:4x64x4,4000:4x128x4,7000:4x256x8,10000:4x512x8"


# ---------------------------------------------------------------------------------------------- command line


def emit(**result: Any) -> None:
    """Print one JSON object on a line, floats to five decimals."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(item) for name, item in value.items()}
        return round(value, 5) if isinstance(value, float) else value

    click.echo(json.dumps(short(result)))


def ids_and_counts(data: Path | None, n: int, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n token ids in order and the counts (V,) of all ids: of prepared data, or drawn by Zipf's law."""
    if data is None:
        frequency = 1 / np.arange(2.0, vocab_size + 2)
        counts = np.maximum(1, 1e9 * frequency / frequency.sum()).astype(np.int64)
        return np.random.default_rng(seed).choice(vocab_size, n, p=frequency / frequency.sum()), counts
    from flashlm_numba.data.shards import open_tokens

    train = open_tokens(data).train
    return train.windows(np.array([0]), n)[0].astype(np.int64), train.counts(vocab_size)


@click.group(help=__doc__.split("\n\n")[0] if __doc__ else None)
def main() -> None:
    pass


def common(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every benchmark."""
    for option in (
        click.option("--data", type=click.Path(path_type=Path), help="Prepared tokens; default: Zipf's law."),
        click.option("--seed", default=0, show_default=True),
        click.option("--repeats", default=5, show_default=True),
        click.option("--threads", default=available_cores(), show_default=True),
    ):
        command = option(command)
    return command


@main.command("head")
@common
@click.option("--rows", "rows_list", multiple=True, type=int, default=(512, 2048), show_default=True)
@click.option("--vocab", default=50_257, show_default=True)
@click.option("--dim", default=256, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile (needs a C++ compiler).")
def head_command(
    threads: int,
    repeats: int,
    seed: int,
    data: Path | None,
    rows_list: tuple[int, ...],
    vocab: int,
    dim: int,
    compiled: bool,
) -> None:
    """Forward and backward of the heads, positions per second."""
    torch.set_num_threads(threads)
    emit(**timing.environment(threads))
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((vocab, dim), dtype=np.float32) * np.float32(0.02)
    for rows in rows_list:
        targets, counts = ids_and_counts(data, rows, vocab, seed)
        h = rng.standard_normal((rows, dim), dtype=np.float32)
        candidates = head_candidates(h, weight, targets, frequency_ranks(counts), compiled=compiled)
        for name, seconds in timing.measure(candidates, repeats).items():
            emit(head=name, rows=rows, seconds=seconds, positions_per_s=timing.rate(seconds, rows))


@main.command("trunk")
@common
@click.option("--batch", default="16x128", show_default=True, help="ROWSxLENGTH")
def trunk_command(threads: int, repeats: int, seed: int, data: Path | None, batch: str) -> None:
    """Hidden states, forward and backward, with the embedding's gradient; tokens per second."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    emit(**timing.environment(threads))
    (phase,) = Phase.parse(batch)
    model = PeerModel()
    n = phase.batch_size * phase.seq_len
    ids = torch.from_numpy(ids_and_counts(data, n, model.config.vocab_size, seed)[0]).view(
        phase.batch_size, phase.seq_len
    )
    cotangent = torch.randn(n, model.config.dim)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.hidden(ids).backward(cotangent)

    seconds = timing.measure({"trunk": run}, repeats)["trunk"]
    emit(trunk=batch, seconds=seconds, tokens_per_s=timing.rate(seconds, n))


@main.command("step")
@common
@click.option("--batch", "batches", multiple=True, default=("16x128",), show_default=True, help="ROWSxLENGTH[xMICRO]")
@click.option("--head", type=click.Choice(["dense", "adaptive"]), default="dense", show_default=True)
@click.option("--div-value", default=4.0, show_default=True, help="Of the adaptive head; 4 is torch's default.")
@click.option("--positions", multiple=True, type=float, default=(1.0, 0.25), show_default=True)
@click.option("--label-smoothing", default=0.0, show_default=True)
@click.option("--z-loss", default=0.0, show_default=True)
@click.option("--normuon", type=click.Choice(["v3", "published"]), default="v3", show_default=True)
@click.option("--fused", is_flag=True, help="torch's fused AdamW.")
def step_command(
    threads: int,
    repeats: int,
    seed: int,
    data: Path | None,
    batches: tuple[str, ...],
    head: str,
    div_value: float,
    positions: tuple[float, ...],
    label_smoothing: float,
    z_loss: float,
    normuon: str,
    fused: bool,
) -> None:
    """A whole training step: tokens per second, and the shares of head, trunk and optimiser."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    emit(**timing.environment(threads))
    for batch in batches:
        for share in positions:
            emit(
                batch=batch,
                positions=share,
                head=head if head == "dense" else f"adaptive-div{div_value:g}",
                **measure_step(
                    batch,
                    positions=share,
                    adaptive_div=div_value if head == "adaptive" else None,
                    repeats=repeats,
                    seed=seed,
                    data=data,
                    normuon=normuon,
                    fused=fused,
                    **({} if head == "adaptive" else {"label_smoothing": label_smoothing, "z_loss": z_loss}),
                ),
            )


def measure_step(
    batch: str,
    *,
    positions: float = 1.0,
    adaptive_div: float | None = None,
    repeats: int = 5,
    seed: int = 0,
    data: Path | None = None,
    normuon: str = "v3",
    fused: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Time whole training steps of one batch shape: {"tokens_per_s": {median, p20, p80}, "shares": {...}}."""
    (phase,) = Phase.parse(batch)
    config = ModelConfig()
    n = phase.batch_size * phase.seq_len
    ids, counts = ids_and_counts(data, n * phase.grad_accum + 1, config.vocab_size, seed)
    ranks = frequency_ranks(counts) if adaptive_div else None
    model = PeerModel(config, ranks=ranks, div_value=adaptive_div or 4.0)
    optimizers = Optimizers(model, normuon=normuon, fused=fused)
    flat = torch.from_numpy(ids)
    pairs = [
        (
            flat[i * n : (i + 1) * n].view(phase.batch_size, -1),
            flat[i * n + 1 : (i + 1) * n + 1].view(phase.batch_size, -1),
        )
        for i in range(phase.grad_accum)
    ]
    clock: dict[str, float] = {}
    spent = []
    for turn in range(repeats + 2):  # one after another, as in training, and as ours are timed
        if turn == 2:
            clock.clear()  # of the warm-up
        start = time.perf_counter()
        training_step(model, optimizers, pairs, positions=positions, clock=clock, **options)
        spent.append(time.perf_counter() - start)
    seconds = timing.summary(spent[2:])
    whole = sum(clock.values())
    return {
        "tokens_per_s": timing.rate(seconds, n * phase.grad_accum),
        "shares": {part: round(clock[part] / whole, 4) for part in ("trunk", "head", "optimizer")},
    }


@main.command("train")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--head", type=click.Choice(["dense", "adaptive"]), default="dense", show_default=True)
@click.option("--div-value", default=4.0, show_default=True, help="Of the adaptive head; 4 is torch's default.")
@click.option("--batch", default=V3_PHASES, show_default=True, help="[LAST_STEP:]ROWSxLENGTH[xMICRO],... ; v3's phases")
@click.option("--steps", type=int, help="Steps to train; default: to the end of the last phase.")
@click.option("--minutes", type=float, help="Stop after this much training time, the start of E aside.")
@click.option("--start", default="random", show_default=True, help="Of E: random, corpus, or a .npy of (V, C).")
@click.option("--start-std", default=0.02, show_default=True, help="Of a random start.")
@click.option("--frozen-steps", default=0, show_default=True, help="E is held fixed for this many steps.")
@click.option("--positions", default=0.25, show_default=True, help="Share of positions with a loss (adaptive: 1).")
@click.option("--label-smoothing", default=0.1, show_default=True)
@click.option("--z-loss", default=1e-4, show_default=True)
@click.option("--soft-cap", type=float)
@click.option("--log-prior", is_flag=True, help="Add the log frequency of the tokens to the logits.")
@click.option("--normuon", type=click.Choice(["v3", "published"]), default="v3", show_default=True)
@click.option("--normuon-lr", default=0.02, show_default=True)
@click.option(
    "--mixer-residual-scale", default=1.0, show_default=True, help="Factor of the mixer's output; v3 has none."
)
@click.option("--ffn-residual-scale", default=1.0, show_default=True, help="Factor of the GLU's output; v3 has none.")
@click.option("--dilations", default="1,4,64", show_default=True, help="Of the mixer's convolutions.")
@click.option("--leaky-decay", default=0.0, show_default=True, help="Of the running average; 0, as in v3: none.")
@click.option("--ngram-copy-orders", default="", help="Orders of followers, such as 1,2,3; v3 has none.")
@click.option("--ngram-copy-reach", default=1024, show_default=True, help="Tokens that followers are looked for in.")
@click.option("--ternary-threshold", default=1.0, show_default=True, help="Times the mean magnitude of a matrix.")
@click.option("--adamw-lr", default=3e-4, show_default=True)
@click.option(
    "--nonembedding-lr-scale", default=1.0, show_default=True, help="Times AdamW's: of convolutions and norms."
)
@click.option("--adamw-beta1", default=0.9, show_default=True)
@click.option("--adamw-beta2", default=0.95, show_default=True)
@click.option("--weight-decay", default=0.1, show_default=True)
@click.option("--fused", is_flag=True, help="torch's fused AdamW.")
@click.option("--clip", default=1.0, show_default=True, help="Largest gradient norm.")
@click.option("--warmup", default=200, show_default=True, help="Steps.")
@click.option("--decay", default=1000, show_default=True, help="Last steps, over which the rates fall to 0.")
@click.option("--total", type=int, help="Steps that the decay is laid out for; default: the phases' end, or --steps.")
@click.option("--validate-every", default=60.0, show_default=True, help="Seconds of training between validations.")
@click.option("--validate-tokens", default=32_768, show_default=True, help="First tokens used for that; the end: all.")
@click.option("--mark", "marks", multiple=True, type=float, help="Minutes of training to score all validation text at.")
@click.option("--no-final", is_flag=True, help="Leave out the validation on all documents at the end.")
@click.option("--seed", default=42, show_default=True)
@click.option("--threads", default=available_cores(), show_default=True)
def train_command(data: Path, **settings: Any) -> None:
    """Train on prepared tokens; validates outside the clock by the rule of `flashlm-numba eval`."""
    train(data, **settings)


def train(
    data: Path,
    *,
    head: str,
    div_value: float,
    batch: str,
    steps: int | None,
    minutes: float | None,
    start: str,
    start_std: float,
    frozen_steps: int,
    positions: float,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float | None,
    log_prior: bool,
    normuon: str,
    normuon_lr: float,
    mixer_residual_scale: float,
    ffn_residual_scale: float,
    dilations: str,
    leaky_decay: float,
    ngram_copy_orders: str,
    ngram_copy_reach: int,
    ternary_threshold: float,
    adamw_lr: float,
    nonembedding_lr_scale: float,
    adamw_beta1: float,
    adamw_beta2: float,
    weight_decay: float,
    fused: bool,
    clip: float,
    warmup: int,
    decay: int,
    total: int | None,
    validate_every: float,
    validate_tokens: int,
    marks: tuple[float, ...],
    no_final: bool,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """The body of `train`; prints a JSON line at each validation and returns the last."""
    from flashlm_numba.data.shards import open_tokens, sample_batch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = open_tokens(data)
    phases = Phase.parse(batch)
    end = steps if steps is not None else phases[-1].last_step
    if end is None and minutes is None:
        raise click.UsageError("give --steps or --minutes: the last phase has no end")
    config = ModelConfig(
        dilations=tuple(int(dilation) for dilation in dilations.strip("[]").split(",")),
        mixer_residual_scale=mixer_residual_scale,
        ffn_residual_scale=ffn_residual_scale,
        leaky_decay=leaky_decay,
        ngram_copy_orders=tuple(int(order) for order in ngram_copy_orders.strip("[]").split(",") if order),
        ngram_copy_reach=ngram_copy_reach,
        ternary_threshold=ternary_threshold,
    )
    counts = tokens.train.counts(config.vocab_size)
    adaptive = head == "adaptive"
    model = PeerModel(
        config,
        ranks=frequency_ranks(counts) if adaptive else None,
        div_value=div_value,
        embedding_std=start_std,
    )
    seconds = 0.0  # of training: the start of E out of the corpus, and steps
    if start != "random":
        if start == "corpus":
            from flashlm_numba.model.embedding_init import cached_start

            rows, seconds = cached_start(tokens, config.dim)
        else:
            rows = np.load(start)
        with torch.no_grad():
            model.embedding.weight.copy_(torch.from_numpy(rows))
    prior = None
    if log_prior and not adaptive:
        prior = torch.from_numpy(np.log((counts + 1) / (counts + 1).sum()).astype(np.float32))
    scoring: dict[str, Any] = {"log_prior": prior, "soft_cap": soft_cap}
    options: dict[str, Any] = {} if adaptive else {"label_smoothing": label_smoothing, "z_loss": z_loss, **scoring}
    optimizers = Optimizers(
        model,
        normuon=normuon,
        normuon_lr=normuon_lr,
        adamw_lr=adamw_lr,
        trunk_factor=nonembedding_lr_scale,
        betas=(adamw_beta1, adamw_beta2),
        weight_decay=weight_decay,
        clip=clip,
        fused=fused,
    )
    emit(**timing.environment(threads))
    emit(
        data=str(data),
        head=head if not adaptive else f"adaptive-div{div_value:g}",
        parameters=sum(p.numel() for p in model.parameters()),
        groups={name: len(members) for name, members in parameter_groups(model).items()},
    )
    ngram_copies(np.zeros((1, 1), np.int32), 1, 1)  # compiled outside the clock
    seen, step, due, start_seconds = 0, 0, seconds + validate_every, seconds
    left = sorted(marks)
    clock: dict[str, float] = {}
    result: dict[str, Any] = {}
    peak: float | None = None
    loss = math.nan
    while True:
        done = (end is not None and step >= end) or (minutes is not None and seconds - start_seconds >= 60 * minutes)
        marked = bool(left) and seconds >= 60 * left[0] and not done
        if seconds >= due or done or marked:
            whole = marked or (done and not no_final)
            if whole and peak is None:  # of training: scoring whole documents takes more
                peak = peak_rss_mb()
            limit = None if whole else validate_tokens
            validation = score(model, tokens.validation, max_tokens=limit, **scoring)
            result = {
                **({"mark": left.pop(0)} if marked else {}),
                "step": step,
                "tokens": seen,
                "seconds": seconds,
                "loss": None if math.isnan(loss) else loss,
                "validation": "all" if whole else f"first {validation['tokens']} tokens",
                **{f"val_{name}": value for name, value in validation.items()},
                "start_seconds": start_seconds,
                "tokens_per_s": seen / (seconds - start_seconds) if seen else None,
                "shares": {part: round(t / (seconds - start_seconds), 4) for part, t in clock.items()},
                "peak_rss_mb": peak_rss_mb() if peak is None else peak,
            }
            emit(**result)
            due = seconds + validate_every
        if done:
            return result
        begin = time.perf_counter()
        phase = next((p for p in phases if p.last_step is None or step < p.last_step), phases[-1])
        model.embedding.weight.requires_grad_(step >= frozen_steps)
        batches = []
        for micro in range(phase.grad_accum):
            ids, targets = sample_batch(tokens.train, seed, step, micro, phase.batch_size, phase.seq_len)
            batches.append((torch.from_numpy(ids).long(), torch.from_numpy(targets).long()))
        loss = training_step(
            model,
            optimizers,
            batches,
            positions=1.0 if adaptive else positions,
            scale=schedule(step, warmup=warmup, total=total or phases[-1].last_step or steps, decay=decay),
            generator=generator,
            clock=clock,
            **options,
        )
        seconds += time.perf_counter() - begin
        seen += phase.batch_size * phase.seq_len * phase.grad_accum
        step += 1


if __name__ == "__main__":
    main()
