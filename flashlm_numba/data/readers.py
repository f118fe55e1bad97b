"""Read the texts of one local file, each format with its own library.

read_texts() is the only place that turns the errors of these libraries into sentences, with file, place and remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashlm_numba.data.documents import Missing, NotText, pick, reason, without_surrogates
from flashlm_numba.data.streams import (
    MAX_DOCUMENT,
    MAX_WINDOW,
    LineTooLong,
    NulCharacter,
    Position,
    lines,
    text_blocks,
    with_newlines,
)
from flashlm_numba.system.errors import UserError

ROWS = 256  # rows of a Parquet file in memory at once
DEPTH = 50  # containers of a JSON row nested deeper than this are skipped, if the parser cannot follow them

# Integers of other columns may have any length, which int() refuses; float() takes them all.
_decoder = json.JSONDecoder(parse_int=float)
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]')


# what zstd says of a frame that is not damaged, and what helps
_REMEDIES = {
    "Dictionary mismatch": "compress it again without a dictionary",
    "requires too much memory": f"compress it again with a window of at most {MAX_WINDOW >> 30} GB",
}


class NotAnObject(Exception):
    """A line of JSON holds something else than an object."""


def read_texts(
    path: Path,
    kind: str,
    column: str,
    *,
    by_line: bool = False,
    skip_missing: bool = False,
    note: Callable[[str], None] = lambda sentence: None,
) -> Iterator[str]:
    """Stream the texts of a file; a row without text is an empty string.

    kind : parquet, json or text;  by_line : treat each line of a text as a document
    skip_missing : accept a file in which no row has the column;  note : receives a sentence on rows that lack it
    Raises UserError for anything that cannot be read.
    """
    position = Position("row" if kind == "parquet" else "line")
    missing = Missing()
    try:
        if kind == "parquet":
            texts = _parquet_texts(path, column, position, missing)
        elif kind == "json":
            texts = _json_texts(path, column, position, missing)
        elif by_line:
            texts = lines(with_newlines(text_blocks(path)), position)
        else:
            texts = _whole_text(path, position)
        yield from texts
    except Exception as error:  # each library has its own kinds of errors, and a damaged file raises any of them
        raise UserError(_sentence(error, path, column, position)) from error
    missing.report(str(path), column, position.number, skip_missing=skip_missing, note=note)


def _whole_text(path: Path, position: Position) -> Iterator[str]:
    parts = []
    for part in with_newlines(text_blocks(path)):
        position.number += part.count("\n")
        parts.append(part)
    yield "".join(parts)


def _json_texts(path: Path, column: str, position: Position, missing: Missing) -> Iterator[str]:
    rows = 0
    for line in lines(text_blocks(path), position):
        line = line.strip("\ufeff \t\r")  # files with a mark may have been joined
        if not line:
            continue
        try:
            row = _decoder.decode(line)
        except RecursionError:
            row = _decoder.decode(_shallow(line))
        if not isinstance(row, dict):
            raise NotAnObject
        rows += 1
        text = pick(row, column, missing.add)
        yield text if text.isascii() else without_surrogates(text)
    position.number, position.unit = rows, "row"  # for the sentence on missing columns; blank lines are no rows


def _shallow(line: str) -> str:
    """A line of JSON with null in the place of containers that are nested deeper than DEPTH."""
    parts, depth, done = [], 0, 0
    for token in _TOKEN.finditer(line):
        if token[0] in "[{":
            depth += 1
            if depth == DEPTH + 1:
                parts.append(line[done : token.start()] + "null")
        elif token[0] in "]}":
            depth -= 1
            if depth == DEPTH:
                done = token.end()
    return "".join([*parts, line[done:]])


def _parquet_texts(path: Path, column: str, position: Position, missing: Missing) -> Iterator[str]:
    import pyarrow.parquet as parquet

    # an open file, because pyarrow takes only names in UTF-8
    with path.open("rb") as source, parquet.ParquetFile(source, buffer_size=1 << 20) as file:
        names = file.schema_arrow.names
        found = column if column in names else column.split(".")[0]
        if names.count(found) > 1:
            raise UserError(f"{path} has {names.count(found)} columns named {found}: rename all but one of them.")
        if found not in names or (found != column and not _is_nested(file.schema_arrow.field(found).type, column)):
            position.number = missing.rows = file.metadata.num_rows
            missing.columns = names
            return
        for batch in file.iter_batches(ROWS, columns=[column], use_threads=False):
            for value in batch.column(found):
                position.number += 1
                yield pick({found: value.as_py()}, column)


def _is_nested(kind: Any, column: str) -> bool:
    """Whether a struct type has the fields that the words of column name after the first."""
    import pyarrow

    for name in column.split(".")[1:]:
        if not pyarrow.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return False
        kind = kind.field(name).type
    return True


def _sentence(error: Exception, path: Path, column: str, position: Position) -> str:
    """A sentence for an error of any library while a file is read."""
    at = f"{path}, {position.unit} {position.number:,}"
    after = f"after {position.unit} {position.number:,}" if position.number else "at its beginning"
    following = f"{path}, {position.unit} {position.number + 1:,}"
    match error:
        case UserError():
            return str(error)
        case NotText():
            return f"{at}: in column {column}, {error}, not text; choose another --column."
        case NotAnObject():
            return f"{at} is not a JSON object: correct or delete that line."
        case LineTooLong():
            return f"{following} is longer than {MAX_DOCUMENT >> 20} million characters: divide that line."
        case NulCharacter():
            return (
                f"{following} has a NUL character, so the file is damaged, binary, or UTF-16 without a mark: "
                "copy it again, or save it as UTF-8."
            )
        case UnicodeDecodeError():
            where = following if position.unit == "line" else at
            name = error.encoding.upper().removesuffix("-LE").removesuffix("-BE")
            return f"{where} is not {name}: save the file again as UTF-8."
        case json.JSONDecodeError():
            return f"{at} is not valid JSON ({error.msg}, character {error.pos + 1:,}): correct or delete that line."
        case EOFError():
            return f"{path} is cut off {after}: copy or download it again."
        case MemoryError():
            return f"{path} needs more memory than there is, {after}, or is damaged: copy it again, or divide it."
        case OSError(errno=number) if number is not None:
            return f"Cannot read {path} {after}: {error.strerror or reason(error)}."
    for words, remedy in _REMEDIES.items():
        if words in str(error):
            return f"{path} cannot be decompressed ({reason(error)}): {remedy}."
    return f"{path} is damaged {after} ({reason(error)}): copy or download it again."
