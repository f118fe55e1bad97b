"""Find the files of a folder or a glob: links to folders are followed once, and every real file is found once."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from flashlm_numba.system.errors import UserError


def files_below(folder: Path) -> list[tuple[Path, str]]:
    """The files below a folder, except hidden ones, with their names relative to it."""
    return _each_once(folder, _walk(folder))


def files_matching(pattern: str) -> list[tuple[Path, str]]:
    """The files that match a glob, with their names relative to its part without wildcards. `**` is any folders."""
    folder, *parts = map(Path, Path(pattern).parts)
    if glob.has_magic(str(folder)):
        folder, parts = Path(), [folder, *parts]
    while parts and _is_literal(folder, parts[0].name):
        folder /= parts.pop(0)
    return _each_once(folder, _matches(folder, [part.name for part in parts]))


def _is_literal(folder: Path, part: str) -> bool:
    """Whether a component of a glob has no wildcards, or is the name of a file or folder with such characters."""
    return not glob.has_magic(part) or os.path.lexists(folder / part)


def _each_once(folder: Path, found: Iterator[Path]) -> list[tuple[Path, str]]:
    """Files sorted by name. Of the names of one real file, the first stays that is no link, or else the first."""
    names = {path.relative_to(folder).as_posix(): path for path in found}
    real: dict[str, tuple[bool, bytes, str]] = {}
    for name, path in names.items():
        own = os.path.realpath(path)
        rank = (own != os.path.join(os.path.realpath(folder), name), os.fsencode(name), name)
        real[own] = min(real.get(own, rank), rank)
    return [(names[name], name) for _, _, name in sorted(real.values(), key=lambda rank: rank[1])]


def _matches(folder: Path, parts: list[str]) -> Iterator[Path]:
    """Files below a folder that match the components of a glob."""
    if not parts:
        if not folder.is_dir():
            yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        if not rest:
            yield from _walk(folder)
            return
        for inner in _folders(folder):
            yield from _matches(inner, rest)
    elif _is_literal(folder, first):
        if os.path.lexists(folder / first):
            yield from _matches(folder / first, rest)
    elif folder.is_dir():
        for entry in _entries(folder):
            if fnmatch.fnmatch(entry.name, first) and (first.startswith(".") or not entry.name.startswith(".")):
                yield from _matches(folder / entry.name, rest)


def _walk(folder: Path) -> Iterator[Path]:
    for inner in _folders(folder):
        for entry in _entries(inner):
            if not entry.name.startswith(".") and not _is_folder(entry):
                yield inner / entry.name


def _folders(folder: Path) -> Iterator[Path]:
    """A folder and all below it, except hidden ones. Links come last, so that a folder keeps its own name."""
    if not folder.is_dir():
        return
    seen: set[str] = set()
    waiting: list[Path] = [folder]
    links: list[Path] = []
    while waiting or links:
        path = waiting.pop(0) if waiting else links.pop(0)
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        yield path
        for entry in _entries(path):
            if not entry.name.startswith(".") and _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(path / entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry leads to a folder. A link to itself, or to where this user may not look, is taken for a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder}: {error.strerror or error}.") from error
