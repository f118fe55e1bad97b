"""Small sources of documents, and what was prepared of them, for the tests of data/."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import Split
from flashlm_numba.data.tokenizer import vocabulary_named

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
