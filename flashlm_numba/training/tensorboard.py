"""The values of a run's steps as event files of TensorBoard, by the library tensorboardX."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError

# a step's keys in metrics.jsonl, by the name in TensorBoard
NAMES = {
    "loss/training": "loss",
    "loss/nll": "nll",
    "loss/validation_nll": "val_nll",
    "loss/validation_nll_ema": "val_nll_ema",
    "schedule/lr": "lr",
    "schedule/tokens": "tokens",
    "speed/tokens_per_s": "tokens_per_s",
}


def check_package() -> None:
    """Raise UserError if tensorboardX is missing."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--tensorboard needs tensorboardX; install it with `pip install 'flashlm-numba[tensorboard]'`.")


class TensorBoard(Progress):
    """Passes on what it is told, and writes the values of each step.

    inner : what it is passed on to;  folder : of the event files; a resumed run's later steps are replaced there
    """

    def __init__(self, inner: Progress, folder: Path) -> None:
        self._inner, self._folder = inner, folder
        self._writer: Any = None

    def note(self, text: str) -> None:
        """See Progress."""
        self._inner.note(text)

    @contextlib.contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """See Progress."""
        from tensorboardX import SummaryWriter

        # the name of the file has a suffix, since another one that is made within a second would replace it
        first = done + 1
        self._writer = SummaryWriter(
            str(self._folder), purge_step=first if done else None, filename_suffix=f".from-step-{first}"
        )
        try:
            with self._inner.steps(total, done):
                yield
        finally:
            self._writer.close()

    def shorten(self, total: int) -> None:
        """See Progress."""
        self._inner.shorten(total)

    def step(self, line: dict[str, Any], seconds_left: float) -> None:
        """See Progress."""
        shares = {f"share_of_time/{name}": share for name, share in line["shares"].items()}
        values = {name: line[key] for name, key in NAMES.items() if key in line} | shares
        for name, value in values.items():
            self._writer.add_scalar(name, value, line["step"])
        self._inner.step(line, seconds_left)

    @contextlib.contextmanager
    def tokens(self, label: str, total: int | None) -> Iterator[Progress]:
        """See Progress."""
        with self._inner.tokens(label, total) as bar:
            yield bar

    @contextlib.contextmanager
    def functions(self, label: str, total: int) -> Iterator[Progress]:
        """See Progress."""
        with self._inner.functions(label, total) as bar:
            yield bar

    def advance(self, count: int) -> None:
        """See Progress."""
        self._inner.advance(count)

    def stopping(self) -> None:
        """See Progress."""
        self._inner.stopping()
