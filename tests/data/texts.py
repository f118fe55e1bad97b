"""Small sources of documents, and what was prepared of them, for the tests of data/."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import Split
from flashlm_numba.data.vocabularies import vocabulary_named

GPT2 = vocabulary_named("gpt2")

WORDS = ["the", "river", "Ångström", "runs", "<|endoftext|>", "42", "\n\n", "中文", "slowly,", "and", "."]
quiet = functools.partial(prepare, progress=False)


def make_texts(n, seed=0):
    """n different documents of 1 to 60 words."""
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(WORDS, size=rng.integers(1, 60))) for i in range(n)]


def write_jsonl(path: Path, texts) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_parquet(path: Path, texts) -> None:
    pq.write_table(pa.table({"text": texts, "id": [str(i) for i in range(len(texts))]}), path)


def texts_of(split: Split) -> list[str]:
    tokenizer = GPT2
    return [tokenizer.decode(ids) for ids in split.documents()]


def flat(folder: Path, split: str) -> np.ndarray:
    """The shards as plain files, without the code under test."""
    names = sorted(p for p in folder.iterdir() if p.name.startswith(f"{split}-"))
    return np.concatenate([np.fromfile(p, dtype="<u2") for p in names] or [np.zeros(0, "<u2")])


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".bin", ".json")}


TEXTS = ["First document.\n\nIt has two lines.", "Second: é, 中文, 🙂.", "Third\tand last."]


def fineweb_table(texts):
    """The columns of FineWeb-Edu."""
    n = len(texts)
    return pa.table(
        {
            "text": pa.array(texts, pa.string()),
            "id": [f"<urn:uuid:{i}>" for i in range(n)],
            "dump": ["CC-MAIN-2024-10"] * n,
            "url": [f"https://example.org/{i}" for i in range(n)],
            "file_path": ["s3://x"] * n,
            "language": ["en"] * n,
            "language_score": [0.9] * n,
            "token_count": pa.array(range(n), pa.int64()),
            "score": [3.1] * n,
            "int_score": pa.array([3] * n, pa.int64()),
        }
    )


def jsonl(texts):
    return "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)).encode()


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        pq.write_table(fineweb_table(texts), path, row_group_size=2)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(texts)))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(jsonl(texts)))
    elif path.name.endswith(".jsonl"):
        path.write_bytes(jsonl(texts))
    else:
        path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)
