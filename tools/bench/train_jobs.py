"""A job of tools/bench_train.py: the run to train, its command, and its row in the results."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from flashlm_numba.model.config import SECTIONS, RunConfig
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.settings import parse_phase
from tools.bench.train_candidates import BASELINES, DECAY_SHARE, OURS, option_of

# Settings that change no result. The last three act on a text that is read often, or has few tokens; rows from before
# they came are of one that is large.
QUIET = (
    "validate_every",
    "sample_tokens",
    "log_every",
    "checkpoint_minutes",
    "early_warmdown",
    "hidden_dropout",
    "embedding_dropout",
)


@dataclass(frozen=True)
class Job:
    """One run: candidate, settings and budget."""

    name: str
    settings: tuple[str, ...]  # key=value, beside the candidate's own
    seed: int
    tokens: int | None
    minutes: float | None
    threads: int
    marks: tuple[float, ...] = ()  # minutes of training before the end, to score at
    speed: Mapping[str, float] = field(default_factory=dict)  # by which minutes became tokens, and they: speeds.py

    @property
    def slug(self) -> str:
        """A file name for this run that depends on recipe, settings and marks."""
        budget = f"{self.tokens}tokens" if self.tokens is not None else f"{self.minutes:g}min"
        everything = json.dumps([self.key, self.recipe, self.marks], sort_keys=True)
        words = [self.name, budget, f"seed{self.seed}", hashlib.sha256(everything.encode()).hexdigest()[:8]]
        return "-".join(words).replace(":", "-")

    @property
    def key(self) -> dict[str, Any]:
        """The values that identify this job's row. With a budget in tokens they exclude the number of threads."""
        budget = {"tokens_asked": self.tokens} if self.tokens is not None else {"minutes_asked": self.minutes}
        threads = {} if self.tokens is not None else {"threads": self.threads}
        return {"name": self.name, "settings": list(self.settings), "seed": self.seed, **budget, **threads}

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe: the settings of our candidates (see differences), or the options of a baseline."""
        if self.name in BASELINES:
            return self.baseline_options
        words, recipe, settings = OURS[self.name], "default", list(self.settings)
        for option, value in zip(words[::2], words[1::2], strict=True):
            if option == "--recipe":
                recipe = value
            else:
                settings.insert(0, {"--head": f"head.name={value}", "--tree": f"head.tree={value}"}.get(option, value))
        return differences(from_recipe(recipe, settings, idle=True))  # older rows have some without an effect

    def made(self, row: dict[str, Any]) -> bool:
        """Whether a row of a results file belongs to this job: the same run with the same recipe, however requested,
        and with scores at least at these marks. A row without a recipe belongs to no job.
        """
        if not set(self.marks) <= set(row.get("marks_asked", [mark["minutes"] for mark in row.get("marks", [])])):
            return False
        asked = {**self.key, "recipe": self.recipe, "settings": row.get("settings")}
        return asked.items() <= row.items()

    @property
    def command(self) -> list[str]:
        """The arguments that train it, without data and folder; run_baseline turns a baseline's minutes into steps."""
        if self.name in OURS:
            sets = itertools.chain.from_iterable(("--set", setting) for setting in self.settings)
            budget = ["--tokens", str(self.tokens)] if self.tokens is not None else ["--minutes", f"{self.minutes:g}"]
            return ["train", *OURS[self.name], *sets, *budget, "--seed", str(self.seed), "--threads", str(self.threads)]
        if self.tokens is None:
            return ["train", *self.baseline_words(None), "--minutes", f"{self.minutes:g}", *self.mark_words]
        return ["train", *self.baseline_words(-(-self.tokens // self.tokens_per_step))]

    @property
    def published(self) -> bool:
        """Whether this is a baseline with a schedule of its own, which minutes only stop."""
        return "total" in BASELINES.get(self.name, {})

    @property
    def mark_words(self) -> list[str]:
        """The baseline's options for marks."""
        return [word for mark in self.marks for word in ("--mark", f"{mark:g}")]

    @property
    def baseline_options(self) -> dict[str, str]:
        """The baseline's options, but for the length of its run; "warmdown-ratio" is the share that decays."""
        options, known = dict(BASELINES[self.name]), option_of(self.name)
        for setting in self.settings:
            name, _, value = setting.partition("=")
            if name not in known:
                raise click.UsageError(f"{self.name} knows no setting {name}; it has {', '.join(known)}.")
            options[known[name]] = value
        return options

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step of the baseline, whose batches have one shape. Raises UserError for another text."""
        return parse_phase(self.baseline_options["batch"]).tokens

    def baseline_words(self, steps: int | None) -> list[str]:
        """The baseline's command line for so many steps; None: its own schedule."""
        options = self.baseline_options
        share = options.pop("warmdown-ratio", str(DECAY_SHARE))
        try:
            decaying = float(share)
        except ValueError:
            raise click.UsageError(f"warmdown_ratio must be a number from 0 to 1, got '{share}'.") from None
        if not 0 <= decaying <= 1:
            raise click.UsageError(f"warmdown_ratio must be a number from 0 to 1, got '{share}'.")
        if steps is not None:
            options |= {"steps": str(steps), "decay": str(round(decaying * steps))}
        options |= {"seed": str(self.seed), "threads": str(self.threads)}
        return ["--fused", *itertools.chain.from_iterable((f"--{name}", value) for name, value in options.items())]


def differences(run: RunConfig) -> dict[str, Any]:
    """The settings of a run that differ from their defaults (config.py), except those in QUIET, as JSON values:
    {"model.leaky_decay": 0.98, ...}. Settings that are added later do not change older rows.
    """
    found = {}
    for section in SECTIONS:
        part = getattr(run, section)
        for item in dataclasses.fields(part):
            if item.name not in QUIET and getattr(part, item.name) != item.default:
                found[f"{section}.{item.name}"] = getattr(part, item.name)
    return json.loads(json.dumps(found, default=dataclasses.asdict))


def expand(settings: Iterable[str]) -> list[tuple[str, ...]]:
    """Every combination of `key=a,b` lists, as tuples of `key=value`.

    >>> expand(["adamw_lr=1e-3,2e-3", "clip=1"])
    [('adamw_lr=1e-3', 'clip=1'), ('adamw_lr=2e-3', 'clip=1')]
    >>> expand(["dilations=[1,4,16],[1,4,64]"])  # commas in brackets belong to the value
    [('dilations=[1,4,16]',), ('dilations=[1,4,64]',)]
    """
    lists = []
    for text in settings:
        name, equals, values = text.partition("=")
        if not equals:
            raise click.UsageError(f"--set takes key=value or key=value,value, got '{text}'.")
        lists.append([f"{name}={value}" for value in re.split(r",(?![^\[]*\])", values)])
    return list(itertools.product(*lists))
