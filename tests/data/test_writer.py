"""A prepare that was stopped, killed or damaged goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time

import pytest
from texts import content, make_texts, quiet, write_jsonl, write_parquet

from flashlm_numba.data import documents, encoding, hub, splits, writer
from flashlm_numba.data import prepare as preparing
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.system.errors import UserError


@pytest.mark.parametrize("stop_after", [0, 1, 40, 77])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_stopped_prepare_continues_to_the_same_bytes(tmp_path, monkeypatch, stop_after, error):
    source = write_jsonl(tmp_path / "a.jsonl", ["", *make_texts(150)])
    options = {"shard_tokens": 500, "max_tokens": 4_000}
    quiet(source, tmp_path / "whole", **options)
    append = writer.ShardWriter.append
    calls = 0

    def failing(self, ids):
        nonlocal calls
        calls += 1
        if calls > stop_after:
            append(self, ids[: len(ids) // 2])  # part of a document reaches the file
            self.sync()
            raise OSError(errno.ENOSPC, "No space left on device") if error is OSError else KeyboardInterrupt
        append(self, ids)

    for journal_seconds in (0.0, 3600.0):
        out = tmp_path / f"out-{journal_seconds}"
        calls = 0
        monkeypatch.setattr(preparing, "JOURNAL_SECONDS", journal_seconds)
        monkeypatch.setattr(writer.ShardWriter, "append", failing)
        with pytest.raises(UserError, match="run the same command again to continue"):
            quiet(source, out, **options)
        with pytest.raises(UserError, match="is not finished"):
            open_tokens(out)
        monkeypatch.setattr(writer.ShardWriter, "append", append)
        if stop_after > 1 and journal_seconds == 0.0:
            with pytest.raises(UserError, match="holds an unfinished corpus from another source"):
                quiet(source, out, shard_tokens=500)
        quiet(source, out, **options)
        assert content(out) == content(tmp_path / "whole")


def test_killed_prepare_continues_to_the_same_bytes(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(3_000))
    quiet(source, tmp_path / "whole")
    out = tmp_path / "out"
    code = (
        "import sys; from flashlm_numba.data import encoding, prepare as preparing\n"
        "preparing.JOURNAL_SECONDS = 0.0; encoding.BATCH_CHARACTERS = 5_000\n"
        "preparing.prepare(sys.argv[1], sys.argv[2], progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, source, str(out)])
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "progress.json").exists() and json.loads((out / "progress.json").read_text())["documents"]:
                break
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    encoded = []
    encode = encoding._encode
    monkeypatch.setattr(encoding, "_encode", lambda *args: encoded.extend(args[1]) or encode(*args))
    quiet(source, out)
    assert 0 < len(encoded) < 3_000  # what was done is not done again
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("roles", "options", "again"),
    [
        ({"all": "012"}, {}, 4 + 26),  # the first look at the source, then the third file up to the limit
        ({"all": "012"}, {"validation": "v"}, 5 + 26),
        ({"train": "012", "validation": "v"}, {}, 5 + 26),
        ({"train": "012", "validation": "v", "test": "t"}, {}, 5 + 5 + 26),
        ({"train": "012", "validation": "v"}, {"split": "train"}, 26),
        ({"train": "01", "other": "2"}, {"split": "validation"}, 26),
    ],
)
def test_stopped_prepare_of_a_hub_dataset_does_not_read_finished_files_again(
    tmp_path, monkeypatch, roles, options, again
):
    texts = make_texts(90)
    for i in range(3):  # three files, the first and the last document of each without text
        write_parquet(tmp_path / f"{i}.parquet", ["", *texts[30 * i : 30 * i + 30], ""])
    write_parquet(tmp_path / "v.parquet", ["", "held out", texts[1], texts[70], "also"])
    write_parquet(tmp_path / "t.parquet", ["test", texts[2], texts[71], "", "tests"])
    source = hub.HubDataset("some/dataset", {role: (files,) for role, files in roles.items()}, revision="f00d")
    validation = hub.HubDataset("v", {"all": ("v",)}, revision="f00d")
    datasets = documents.quiet_datasets()
    load = datasets.load_dataset

    def load_dataset(name, subset, *, split, revision, streaming):
        files = [str(tmp_path / f"{i}.parquet") for i in split]
        return load("parquet", data_files=files, split="train", cache_dir=str(tmp_path), streaming=streaming)

    read = 0
    rows = hub.HubDataset._texts

    def counted(*args):
        nonlocal read
        for text in rows(*args):
            read += 1
            yield text

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(preparing.sources, "resolve", lambda name, **kwargs: validation if name == "v" else source)
    monkeypatch.setattr(splits, "SMALL", 2)
    monkeypatch.setattr(preparing, "JOURNAL_SECONDS", 0.0)
    quiet("some/dataset", tmp_path / "whole", max_docs=85, **options)
    append = writer.ShardWriter.append
    calls = 0

    def failing(self, ids):
        nonlocal calls
        calls += 1
        if calls > 2 * 70:  # in the third file
            raise KeyboardInterrupt
        append(self, ids)

    monkeypatch.setattr(writer.ShardWriter, "append", failing)
    with pytest.raises(UserError, match="Stopped"):
        quiet("some/dataset", tmp_path / "out", max_docs=85, **options)
    monkeypatch.setattr(writer.ShardWriter, "append", append)
    monkeypatch.setattr(hub.HubDataset, "_texts", counted)
    quiet("some/dataset", tmp_path / "out", max_docs=85, **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert read == again


def test_damaged_unfinished_shards_are_made_anew(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    quiet(source, tmp_path / "whole", shard_tokens=500)
    out = tmp_path / "out"
    monkeypatch.setattr(preparing, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(preparing, "_check_splits", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(UserError, match="Stopped"):
        quiet(source, out, shard_tokens=500)
    monkeypatch.undo()
    shard = out / "train-00001.bin"
    shard.write_bytes(b"\1\2" + shard.read_bytes()[2:])
    quiet(source, out, shard_tokens=500)
    assert content(out) == content(tmp_path / "whole")
