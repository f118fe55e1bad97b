"""Where the tokens of a run are: config.json names them relative to the run's folder, so that both may move together.

In memory RunConfig.data is the folder as an absolute path.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from flashlm_numba.data.manifest import MANIFEST, Manifest
from flashlm_numba.model.config import RunConfig
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.paths import from_text, to_text


def stored(run: RunConfig, folder: Path) -> RunConfig:
    """The settings for config.json in folder: with the place of the tokens relative to it, and as it is now."""
    if not run.data:
        return run
    absolute = to_text(run.data)
    with contextlib.suppress(ValueError):  # another drive of Windows has no relative path
        relative = Path(to_text(os.path.relpath(run.data, folder.resolve()))).as_posix()
        return replace(run, data=relative, data_absolute=absolute)
    return replace(run, data=absolute, data_absolute=absolute)


def located(run: RunConfig, folder: Path) -> RunConfig:
    """The settings out of config.json in folder, with the place where the tokens are now: the first with their hash."""
    places = []
    for text in (run.data, run.data_absolute):
        with contextlib.suppress(UnicodeError):  # a damaged file
            if text:
                places.append(os.path.normpath(folder.resolve() / from_text(text)))
    for place in places:
        if _hash(Path(place)) == run.data_hash:
            return replace(run, data=place)
    return replace(run, data=places[-1] if places else "")


def _hash(folder: Path) -> str | None:
    try:
        return Manifest.read(folder / MANIFEST).hash
    except UserError:
        return None
