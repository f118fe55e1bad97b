"""tools/bench_yardsticks.py: compressors and n-grams in bits per byte of the documents."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from flashlm_numba.inference.evaluate import CountedMemory, evaluate_run
from tools import bench_yardsticks
from tools.bench import codecs

TEXTS = ["The people of this nation have seen peace and war.\n" * 40, "", "Ünïcode.\n" * 30]


def bench(*arguments):
    return CliRunner().invoke(bench_yardsticks.main, [str(argument) for argument in arguments])


def test_a_parquet_file_is_one_file_and_its_separators_are_not_counted(tmp_path):
    path, out = tmp_path / "text.parquet", tmp_path / "out.json"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    done = bench(path, "--json", out)
    assert done.exit_code == 0, done.output
    size = sum(len(text.encode()) for text in TEXTS)
    assert f"2 documents, {size:,} bytes" in done.output
    found = json.loads(out.read_text())
    assert set(found["yardsticks"]) == {"gzip -9", "xz -9e", "zstd --ultra -22"}
    packed = len(gzip.compress("\n\n".join(filter(None, TEXTS)).encode(), 9))
    assert found["yardsticks"]["gzip -9"] == {"bytes": packed, "bits_per_byte": 8 * packed / size}
    assert f"| gzip -9 | {8 * packed / size:.3f} |" in done.output


def test_prepared_data_have_the_bytes_of_their_text_and_the_ngrams_of_eval(corpus, corpus_files, run, tmp_path):
    done = bench(corpus, "--json", tmp_path / "out.json", "--threads", 1)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    lines = (corpus_files / "validation.jsonl").read_text().splitlines()
    assert found["bytes"] == sum(len(json.loads(line)["text"].encode()) for line in lines)
    ngrams = found["yardsticks"]["5-gram Kneser-Ney"]
    evaluated = evaluate_run(run, memory=CountedMemory())["memory"]
    assert ngrams["nll"] == pytest.approx(evaluated["alone_nll"], rel=1e-6)
    assert ngrams["bits_per_byte"] == pytest.approx(evaluated["alone_bits_per_byte"], rel=1e-6)
    assert ngrams["ngrams"] == evaluated["ngrams"]


def test_a_codec_that_loses_something_ends_the_program(tmp_path, monkeypatch):
    (tmp_path / "text").write_text(TEXTS[0])
    monkeypatch.setattr(
        bench_yardsticks, "codecs", lambda: {**codecs.codecs(), "lossy": (lambda data: data[:-1], lambda data: data)}
    )
    done = bench(tmp_path / "text")
    assert done.exit_code == 1
    assert "lossy does not give the file back" in done.output


def test_what_cannot_be_scored_is_a_sentence(tmp_path):
    (tmp_path / "empty").touch()
    done = bench(tmp_path / "empty")
    assert done.exit_code == 2
    assert "holds no text to score" in done.output
    done = bench(tmp_path)
    assert done.exit_code == 2
    assert "prepare" in done.output
