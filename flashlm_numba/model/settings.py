"""Read `--set key=value` and config.json into the dataclasses of config.py, and check every value.

>>> with_settings(RunConfig(), ["adamw_lr=1e-3", "dilations=1,2"]).model.dilations
(1, 2)
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashlm_numba.model.config import SECTIONS, Phase, RunConfig
from flashlm_numba.model.idle import refuse_idle
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def with_settings(run: RunConfig, settings: Iterable[str], *, idle: bool = False) -> RunConfig:
    """Apply `key=value` texts, where a key is a field's name with or without its section.

    idle : also accept settings that have no effect with the others
    Raises UserError for an unknown key, a value that is not allowed, or a setting that has no effect with the others.
    """
    changes: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, for example --set clip=0.5, got '{text}'.")
        section, name = _find(key.strip())
        kind = type(getattr(run, section))
        where = f"{section}.{name}"
        parsed = _parse(where, value.strip(), _hints(kind)[name])
        _check(where, parsed, _field(kind, name))
        changes[section][name] = parsed
    try:  # all values of a section at once, because some fit only together
        changed = replace(run, **{part: replace(getattr(run, part), **changes[part]) for part in SECTIONS})
    except ValueError as error:
        raise UserError(f"{error}.") from None
    if not idle:
        refuse_idle(changed, changes)
    return changed


def run_from_json(text: str, path: Path | str = "config.json") -> RunConfig:
    """Read the text of config.json. Raises UserError unless every key is present with the right type and range."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or start a new run.") from None
    try:
        return _build(RunConfig, values, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_run(run: RunConfig) -> None:
    """Raise UserError unless run_from_json() accepts the settings, so that no run is stored that cannot be read."""
    _build(RunConfig, dataclasses.asdict(run), "")


def parse_phase(text: str) -> Phase:
    """Parse a phase such as "1000:4x64x4:frozen". The last step, the micro-batches and ":frozen" are optional.

    >>> parse_phase("1000:4x64x4:frozen").tokens, parse_phase("16x128").last_step
    (1024, None)
    """
    parts = text.strip().split(":")
    frozen = parts[-1] == "frozen"
    parts = parts[: len(parts) - frozen]
    try:
        last = int(parts[-2]) if len(parts) > 1 else None
        sizes = [int(size) for size in parts[-1].split("x")]
        if len(parts) not in (1, 2) or len(sizes) not in (2, 3):
            raise ValueError
    except (ValueError, IndexError):
        raise UserError(
            f"A phase is written LAST_STEP:BATCH_SIZExSEQ_LENxGRAD_ACCUM, like 1000:4x64x4, got '{text}'."
        ) from None
    return Phase(last, sizes[0], sizes[1], sizes[2] if len(sizes) == 3 else 1, frozen)


# --- key=value ---


def _find(key: str) -> tuple[str, str]:
    """Section and field of a `--set` key."""
    names = {}  # both spellings of every key
    for section in SECTIONS:
        for item in dataclasses.fields(_hints(RunConfig)[section]):
            names[f"{section}.{item.name}"] = (section, item.name)
            names[item.name] = (section, item.name)
    if key in names:
        return names[key]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"the settings are {', '.join(k for k in names if '.' not in k)}."
    raise UserError(f"There is no setting '{key}'; {hint}")


def _parse(where: str, text: str, hint: Any) -> Any:
    """Parse the text of a `--set` value for a field of this type."""
    if isinstance(hint, types.UnionType):
        inner = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        return None if text.lower() in ("none", "null") else _parse(where, text, inner)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        parts = [part for part in text.strip("()[]").split(",") if part.strip()]
        if item is Phase:
            return tuple(_build(Phase, dataclasses.asdict(parse_phase(part)), where) for part in parts)
        try:
            return tuple(_parse(where, part.strip(), item) for part in parts)
        except UserError:
            raise UserError(
                f"{where} must be {'whole ' if item is int else ''}numbers with commas between them, got '{text}'."
            ) from None
    if hint is bool:
        words = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
        if text.lower() not in words:
            raise UserError(f"{where} must be true or false, got '{text}'.")
        return words[text.lower()]
    try:
        return hint(text.replace("_", "")) if hint is not str else text
    except ValueError:
        raise UserError(f"{where} must be {_KINDS[hint]}, got '{text}'.") from None


# --- config.json ---


def _build(cls: type, values: Any, where: str) -> Any:
    """Build a dataclass from the values of a JSON object, in which every key must be present and valid."""
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the file'} must be an object, got {type(values).__name__}.")
    names = [item.name for item in dataclasses.fields(cls)]
    prefix = f"{where}." if where else ""
    for item in dataclasses.fields(cls):
        if item.name not in values and not item.metadata.get("optional"):
            raise UserError(f"{prefix}{item.name} is missing.")
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise UserError(f"there is no setting '{prefix}{key}'{hint}")
    hints = _hints(cls)
    made = {}
    for item in dataclasses.fields(cls):
        name = f"{prefix}{item.name}"
        if item.name not in values:
            continue
        made[item.name] = _from_json(name, values[item.name], hints[item.name])
        _check(name, made[item.name], item)
    try:
        return cls(**made)
    except ValueError as error:
        raise UserError(f"{error}.") from None


def _from_json(where: str, value: Any, hint: Any) -> Any:
    """Convert a JSON value to the value of a field."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, got {value!r}.")
        return tuple(_from_json(f"{where}[{i}]", item, typing.get_args(hint)[0]) for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where} must be {_KINDS[hint]}, got {value!r}.")
    return value


# --- both ---


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _field(cls: type, name: str) -> dataclasses.Field:
    return next(item for item in dataclasses.fields(cls) if item.name == name)


def _check(where: str, value: Any, item: dataclasses.Field) -> None:
    """Raise UserError unless value lies in the field's range or choices."""
    choices = item.metadata.get("choices")
    if choices is not None and value not in choices:
        raise UserError(f"{where} must be one of {', '.join(choices)}, got '{value}'.")
    if "low" not in item.metadata or value is None:
        return
    low, high, open_low = item.metadata["low"], item.metadata["high"], item.metadata["open_low"]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be a finite number, got {value:g}.")
    fits = value <= high and (value > low if open_low else value >= low)
    if not fits:
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        bound += f" and at most {high:g}" if high < math.inf else ""
        raise UserError(f"{where} must be {bound}, got {value:g}.")
