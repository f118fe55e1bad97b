"""tools/bench_compress.py restores every file before it reports a size."""

import json

from click.testing import CliRunner

from tools import bench_compress

TEXT = "The people of this nation have seen peace and war.\n" * 40


def bench(*arguments):
    return CliRunner().invoke(bench_compress.main, [str(argument) for argument in arguments])


def test_sizes_and_speeds_are_reported(run, tmp_path):
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_text(TEXT)
    done = bench(run, text, "--bytes", 1_000, "--json", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["original_bytes"] == 969  # whole lines
    assert list(found["codecs"]) == ["flashlm-numba", "gzip -9", "xz -9e", "zstd --ultra -22"]
    for name, row in found["codecs"].items():
        assert 0 < row["bytes"] < 1_200, name
        assert row["compress_kb_per_s"] > 0
        assert f"{row['bytes']:,}" in done.output
    assert found["ideal_bits_per_byte"] < found["codecs"]["flashlm-numba"]["bits_per_byte"]


def test_a_codec_that_loses_something_ends_the_program(run, tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.write_text(TEXT)
    monkeypatch.setattr(bench_compress, "codecs", lambda: {"lossy": (lambda data: data[:-1], lambda data: data)})
    done = bench(run, text)
    assert done.exit_code == 1
    assert "lossy does not give the file back" in done.output
