"""Texts of a local file of every format: the same in every locale, however the file was written, or one sentence."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import subprocess
import sys
import uuid
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from texts import TEXTS, jsonl

from flashlm_numba.data import streams
from flashlm_numba.data.readers import read_texts
from flashlm_numba.system.errors import UserError

KINDS = {"parquet": "parquet", "txt": "text"}


def read(path, column="text", **options):
    return list(read_texts(path, KINDS.get(path.suffix[1:], "json"), column, **options))


def written(path, content):
    if isinstance(content, pa.Table):
        pq.write_table(content, path, row_group_size=2)
    else:
        path.write_bytes(content)
    return path


# --- compressed streams ---


def zstd_block(content, last, kind=0, size=None):
    header = last | kind << 1 | (len(content) if size is None else size) << 3
    return header.to_bytes(3, "little") + content


def zstd_frame(content, *, last=True, window=0x88):
    """A frame of one raw block by hand. window : descriptor; 0x88 is 128 MB"""
    return streams.ZSTD + bytes([0, window]) + zstd_block(content, last)


SKIPPED = b"\x5a\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"any"
ROWS = jsonl(TEXTS * 40)
HALF = ROWS.index(b"\n", len(ROWS) // 2) + 1


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(ROWS[:HALF]) + gzip.compress(ROWS[HALF:]),
        gzip.compress(ROWS) + bytes(512),
        b"".join(gzip.compress(line) for line in ROWS.splitlines(keepends=True)),
        gzip.compress(b"") + gzip.compress(ROWS) + gzip.compress(b""),
    ],
)
def test_gzip_of_several_members_and_padding(tmp_path, content):
    assert read(written(tmp_path / "a.jsonl.gz", content)) == TEXTS * 40


@pytest.mark.parametrize(
    "content",
    [
        zstandard.compress(ROWS[:HALF]) + zstandard.compress(ROWS[HALF:]),
        SKIPPED + zstandard.compress(ROWS[:HALF]) + SKIPPED + SKIPPED + zstandard.compress(ROWS[HALF:]) + SKIPPED,
        b"".join(zstd_frame(ROWS[at : at + 1]) for at in range(len(ROWS))),
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(ROWS),
        zstd_frame(ROWS[:20], window=0xA8) + zstandard.compress(ROWS[20:]),  # 2 GB: 2**31 bytes
    ],
)
def test_zstd_of_several_frames(tmp_path, content):
    assert read(written(tmp_path / "a.jsonl.zst", content)) == TEXTS * 40


def test_stream_without_its_end_is_refused(tmp_path):
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(ROWS)
    cuts = {
        "b.jsonl.gz": [
            gzip.compress(ROWS)[:-1],
            gzip.compress(ROWS)[:-8],
            gzip.compress(ROWS) + gzip.compress(b"x")[:9],
        ],
        "b.jsonl.zst": [whole[:-1], whole[:-4], whole + whole[:3], zstd_frame(ROWS, last=False), whole + SKIPPED[:-1]],
    }
    for name, contents in cuts.items():
        for content in contents:
            with pytest.raises(UserError, match=rf"{name} is cut off (after line \d+|at its beginning): copy"):
                read(written(tmp_path / name, content))


def test_compressed_stream_with_wrong_bytes_is_refused(tmp_path):
    body = bytearray(gzip.compress(ROWS))
    body[-5] ^= 1  # checksum
    block = zlib.compressobj(wbits=31)
    bad = block.compress(ROWS) + block.flush(zlib.Z_FULL_FLUSH) + b"\x07" + ROWS
    for name, content in (
        ("c.jsonl.gz", bytes(body)),
        ("c.jsonl.gz", bad),
        ("c.jsonl.gz", gzip.compress(ROWS) + b"rubbish"),
        ("c.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress(ROWS)[:-2] + b"xx"),
        ("c.jsonl.zst", zstandard.compress(ROWS) + bytes(8)),
    ):
        with pytest.raises(UserError, match=rf"{name} is damaged (after line [\d,]+|at its beginning) \(.*\): copy"):
            read(written(tmp_path / name, content))


def test_zstd_that_is_whole_but_needs_more_says_what(tmp_path):
    dictionary = zstandard.train_dictionary(500, [b"abc def %d" % n * 9 for n in range(500)])
    for content, remedy in (
        (zstandard.ZstdCompressor(dict_data=dictionary).compress(ROWS), "compress it again without a dictionary"),
        (zstd_frame(ROWS, window=0xB0), "compress it again with a window of at most 2 GB"),  # 4 GB
    ):
        with pytest.raises(UserError, match=rf"c\.jsonl\.zst cannot be decompressed \(.*\): {remedy}"):
            read(written(tmp_path / "c.jsonl.zst", content))


def test_much_from_few_bytes_takes_bounded_memory(tmp_path):
    zeros = streams.ZSTD + bytes([0, 0x88]) + zstd_block(b" ", False, 1, 1 << 17) * 4_000 + zstd_block(b"", True)
    sizes = [len(block) for block in streams.blocks(written(tmp_path / "a.jsonl.zst", zeros))]
    assert sum(sizes) == 4_000 << 17
    assert max(sizes) <= 128 << 20


def test_line_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_DOCUMENT", 3_000)
    monkeypatch.setattr(streams, "BLOCK", 512)
    with pytest.raises(UserError, match="line 2 is longer than"):
        read(written(tmp_path / "a.jsonl", b'{"text": "a"}\n' + b" " * 9_000))


# --- encodings ---

ACCENTS = "Ångström, naïve – 中文 🙂\r\nund mehr\rEnde\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_in_every_encoding_with_a_mark(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 3)  # characters, marks and line ends lie across blocks
    mark = "\ufeff" if encoding.endswith("be") else ""
    expected = ACCENTS.replace("\r\n", "\n").replace("\r", "\n")
    path = written(tmp_path / "a.txt", (mark + ACCENTS).encode(encoding))
    assert read(path) == [expected]
    assert read(path, by_line=True) == expected.splitlines()
    rows = mark + json.dumps({"text": ACCENTS}, ensure_ascii=False) + "\r\n\r\n" + '{"text": null}'
    assert read(written(tmp_path / "a.jsonl", rows.encode(encoding))) == [ACCENTS, ""]
    assert read(written(tmp_path / "a.jsonl.gz", gzip.compress(rows.encode(encoding)))) == [ACCENTS, ""]
    assert read(written(tmp_path / "a.jsonl.zst", zstandard.compress(rows.encode(encoding)))) == [ACCENTS, ""]


def test_wrong_bytes_are_named_with_their_line(tmp_path):
    for content in (b"a\nb\n\xff\n", b"a\nb\nc\xe4\xb8", b"\xef\xbb\xbfa\n\nx\xed\xa0\x80\n"):
        for by_line in (False, True):
            with pytest.raises(UserError, match=r"a\.txt, line 3 is not UTF-8: save .* as UTF-8"):
                read(written(tmp_path / "a.txt", content), by_line=by_line)
    with pytest.raises(UserError, match=r"a\.txt, line 2 is not UTF-16"):
        read(written(tmp_path / "a.txt", "\ufeffa\nb".encode("utf-16-le") + b"\x00"))


@pytest.mark.parametrize("by_line", [False, True])
def test_nul_characters_are_refused_wherever_they_are(tmp_path, by_line, monkeypatch):
    """As a crash leaves them at the end of a file, or as UTF-16 without a mark has them."""
    monkeypatch.setattr(streams, "BLOCK", 512)
    for name, content in (("a.txt", b"word\n" * 9_999 + bytes(300)), ("a.txt", "\ufeff\n\n\0".encode("utf-16-le"))):
        lines = content.count(b"\n") + 1
        with pytest.raises(UserError, match=rf"a\.txt, line {lines:,} has a NUL character, so .*: copy it again, or"):
            read(written(tmp_path / name, content), by_line=by_line)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 has a NUL character, so .* UTF-16 without a mark"):
        read(written(tmp_path / "a.jsonl", '{"text": "a"}\n'.encode("utf-16-le")))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, line 121 has a NUL character, so the file is damaged"):
        read(written(tmp_path / "a.jsonl.gz", gzip.compress(ROWS + bytes(5))))
    assert read(written(tmp_path / "a.jsonl", b'{"text": "a\\u0000b"}\n')) == ["a\0b"]  # JSON can write one


def test_joined_files_with_marks(tmp_path):
    row = '\ufeff{"text": "ä"}\n'.encode()
    assert read(written(tmp_path / "a.jsonl.gz", gzip.compress(row) + gzip.compress(row))) == ["ä", "ä"]


def test_locale_changes_nothing(tmp_path):
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    paths = [written(tmp_path / "a.jsonl", rows), written(tmp_path / "b.jsonl.gz", gzip.compress(rows))]
    paths += [written(tmp_path / "c.jsonl.zst", zstandard.compress(rows)), written(tmp_path / "d.txt", rows)]
    code = (
        "import sys, pathlib, hashlib; from flashlm_numba.data.readers import read_texts\n"
        "for p in map(pathlib.Path, sys.argv[1:]):\n"
        "    texts = read_texts(p, 'text' if p.suffix == '.txt' else 'json', 'text')\n"
        "    print(hashlib.sha256('|'.join(texts).encode()).hexdigest())"
    )
    found = set()
    for language, mode in (("C.UTF-8", "1"), ("C", "0"), ("POSIX", "0")):
        environment = os.environ | {"LC_ALL": language, "PYTHONUTF8": mode, "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-c", code, *map(str, paths)]
        found.add(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
    assert len(found) == 1


# --- JSON ---


def test_fields_beside_the_text_may_hold_anything(tmp_path):
    others = ["9" * 5_000, "-" + "1" * 9_999, "NaN", "-Infinity", "1e999", '"\\ud800"', '"\\u0000"', "[1, [2, {}]]"]
    others += ["[" * 5_000 + '"]["' + "]" * 5_000, '{"text": "inner"}', '{"a":' * 3_000 + "1" + "}" * 3_000]
    rows = [f'{{"a": {other}, "text": "t{n}", "a": 1}}' for n, other in enumerate(others)]
    rows += ['{"text": 1, "text": "last"}', '\t{"text" : "\\u2028\u2028\x85"} ']
    path = written(tmp_path / "a.jsonl", "\r\n".join(rows).encode())
    assert read(path) == [*(f"t{n}" for n in range(len(others))), "last", "\u2028\u2028\x85"]


def test_value_that_is_no_text_is_named_with_its_line(tmp_path):
    rows = [{"text": "a"}] * 500
    for value, kind in ((5, "a number"), (1.5, "a number"), (True, "true or false"), ([], "a list"), ({}, "an object")):
        content = "\n\n".join(map(json.dumps, [*rows, {"text": value}])).encode()
        with pytest.raises(UserError, match=rf"a\.jsonl, line 1,001: in column text, the value is {kind}, not text"):
            read(written(tmp_path / "a.jsonl", content))


def test_rows_without_the_column_are_counted_and_named(tmp_path):
    notes = []
    path = written(tmp_path / "a.jsonl", b'{"id": 1}\n' + jsonl(TEXTS))
    assert read(path, note=notes.append) == ["", *TEXTS]
    assert notes == [f"{path}: 1 of 4 rows lack the column text (the first of them has id)."]
    path = written(tmp_path / "b.jsonl", jsonl(TEXTS).replace(b'"text"', b'"content"'))
    with pytest.raises(UserError, match=r"b\.jsonl has no column text: .* --column \(it has content, n\), .*--skip-mi"):
        read(path)
    notes.clear()
    assert set(read(path, skip_missing=True, note=notes.append)) == {""}
    assert notes == [f"{path} has no column text and is left out (it has content, n)."]
    assert read(path, column="content") == TEXTS


def test_of_many_columns_the_message_names_the_first(tmp_path):
    path = written(tmp_path / "a.jsonl", json.dumps({f"c{n}": n for n in range(5_000)}).encode())
    with pytest.raises(
        UserError, match=r"has no column text: .* \(it has c0, c1, .*, c19 and 4,980 more\), or"
    ) as caught:
        read(path)
    assert len(str(caught.value)) < 500


def test_nested_column(tmp_path):
    values = [{"a": {"b": "x", "c": 1}}, {"a": None}, {"a": {"b": None}}, {"a": {"b": "y"}}]
    expected = ["x", "", "", "y"]
    content = "\n".join(map(json.dumps, values)).encode()
    assert read(written(tmp_path / "a.jsonl", content), column="a.b") == expected
    path = written(tmp_path / "a.parquet", pa.Table.from_pylist(values))
    assert read(path, column="a.b") == expected
    flat = pa.table({"a.b": ["flat"], "a": [{"b": "nested"}]})
    assert read(written(tmp_path / "b.parquet", flat), column="a.b") == ["flat"]
    for name in ("a.x", "a.b.c", "b"):
        with pytest.raises(UserError, match=f"has no column {name}: choose"):
            read(path, column=name)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: in column a, the value is an object, not text"):
        read(path, column="a")


# --- Parquet ---

STRINGS = ["a", None, "", "é 🙂"]
WRITES_VIEWS = tuple(map(int, pa.__version__.split(".")[:2])) >= (18, 0)  # and has uuid


@pytest.mark.parametrize(
    "column",
    [
        pa.array(STRINGS),
        pa.array(STRINGS, pa.large_string()),
        *([pa.array(STRINGS, pa.string_view())] if WRITES_VIEWS else []),
        pa.array(STRINGS).dictionary_encode(),
        pa.array(STRINGS, pa.large_string()).dictionary_encode(),
    ],
)
def test_every_type_of_text(tmp_path, column):
    assert read(written(tmp_path / "a.parquet", pa.table({"text": column}))) == ["a", "", "", "é 🙂"]


def test_column_that_is_null_in_one_file(tmp_path):
    assert read(written(tmp_path / "a.parquet", pa.table({"text": pa.nulls(3)}))) == ["", "", ""]


def test_other_columns_may_have_any_type(tmp_path):
    n = len(TEXTS)
    others = {
        "map": pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())),
        "tensor": pa.FixedShapeTensorArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), (2,)), pa.array([[1.0, 2.0]] * n, pa.list_(pa.float32(), 2))
        ),
        "category": pa.array(["x"] * n).dictionary_encode(),
        "decimal": pa.array([None] * n, pa.decimal256(60, 3)),
        "time": pa.array([datetime.datetime(2026, 1, 1)] * n, pa.timestamp("ns", "Europe/Zurich")),
        "half": pa.array([1.5] * n, pa.float16()),
        "struct": pa.array([{"text": 1, "l": [[{"m": b"x"}]]}] * n),
    }
    if WRITES_VIEWS:
        others["uuid"] = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([uuid.uuid4().bytes] * n, pa.binary(16)))
    table = pa.table({**others, "text": TEXTS})
    assert read(written(tmp_path / "a.parquet", table)) == TEXTS
    with pytest.raises(UserError, match="row 1: in column half, the value is"):
        read(tmp_path / "a.parquet", column="half")


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    with pytest.raises(UserError, match="has 2 columns named text: rename"):
        read(written(tmp_path / "a.parquet", table))


def test_text_of_parquet_that_is_not_utf8(tmp_path):
    array = pa.array([b"fine", b"fine", b"na\xefve"], pa.binary()).view(pa.string())
    with pytest.raises(UserError, match=r"a\.parquet, row 3 is not UTF-8"):
        read(written(tmp_path / "a.parquet", pa.table({"text": array})))


# --- damage ---


def outcome(path):
    """The sentence that refuses a file, or "" for texts."""
    try:
        texts = read(path)
    except UserError as error:
        return str(error)
    assert all(isinstance(text, str) for text in texts)
    return ""


@pytest.mark.parametrize(
    "name", ["a.parquet", "plain.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "utf16.txt"]
)
def test_every_byte_damaged_in_turn_gives_text_or_a_sentence(tmp_path, name):
    rows = jsonl(TEXTS)
    path = tmp_path / name
    if name.endswith(".parquet"):
        compression = "NONE" if name == "plain.parquet" else "SNAPPY"
        options = {"compression": compression, "store_schema": False, "write_statistics": False}
        pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), path, **options)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(rows[:99]) + gzip.compress(rows[99:]))
    elif name.endswith(".zst"):
        path.write_bytes(SKIPPED + zstandard.ZstdCompressor(write_checksum=True).compress(rows))
    else:
        path.write_bytes(TEXTS[1].encode("utf-16") if name == "utf16.txt" else "\ufeff".encode() + rows)
    whole = path.read_bytes()
    contents = [whole[:end] for end in range(len(whole))]
    for at, byte in enumerate(whole):
        contents += [whole[:at] + bytes([byte ^ change]) + whole[at + 1 :] for change in (0x01, 0xFF)]
    refused = set()
    for content in contents:
        path.write_bytes(content)
        if sentence := outcome(path):
            assert str(path) in sentence
            assert "\n" not in sentence
            refused.add(sentence)
    assert refused
