"""A disk that fills up, or becomes read-only, under every kind of file: one sentence, nothing lost, and it goes on."""

import subprocess
import sys

import pytest
from programs import INJECTED, assert_every_checkpoint_is_whole, bits, losses, resume_command, train_command

from flashlm_numba.data.gpt2 import GPT2Vocabulary

PLENTY = 100_000  # kilobytes
VOCABULARY = -(-len(GPT2Vocabulary().to_json().encode()) // 4_096) * 4  # kilobytes of the run's tokenizer.json


def run(command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def flashlm(*words):
    return run([sys.executable, "-m", "flashlm_numba", *words])


def assert_one_sentence(done, *parts):
    """Status 1 and, of what was said, one line that begins with Error and holds these parts; no traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in errors[0]


def test_a_checkpoint_without_room_keeps_those_before_and_goes_on_when_there_is_some(corpus, whole, disk):
    INJECTED["disks full or read-only"] += 1
    size = sum(file.stat().st_size for file in (whole / "checkpoints").rglob("*") if file.is_file())
    one = size // len(list((whole / "checkpoints").iterdir())) // 1024  # kilobytes of a checkpoint
    folder = disk(2 * one + one // 2) / "run"
    done = run(train_command(corpus, folder))
    assert_one_sentence(done, "The checkpoint of step 12", "No space left", "free some space there and resume")
    assert_every_checkpoint_is_whole(folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-8"]
    assert_one_sentence(run(resume_command(folder)), "No space left")  # still none: nothing gets worse
    assert_every_checkpoint_is_whole(folder)
    disk(PLENTY)
    done = run(resume_command(folder))
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)


@pytest.mark.slow
def test_a_log_without_room(corpus, whole, disk):
    INJECTED["disks full or read-only"] += 1
    folder = disk(16 + VOCABULARY) / "run"  # settings, and some lines
    without = ["checkpoint_every=100000", "validate_every=0"]  # the best step of a validation would be saved
    done = run(train_command(corpus, folder, *(word for setting in without for word in ("--set", setting))))
    assert_one_sentence(
        done, "No space left", f"free some space there and resume with: flashlm-numba train --resume {folder}"
    )
    disk(PLENTY)
    done = run([*resume_command(folder), "--set", "checkpoint_every=4", "--set", "validate_every=20"])
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)


@pytest.mark.slow
def test_a_start_without_room_leaves_its_folder_free(corpus, disk):
    INJECTED["disks full or read-only"] += 1
    folder = disk(VOCABULARY) / "run"  # no room for the settings
    done = run(train_command(corpus, folder))
    assert_one_sentence(done, "No space left", "choose another --out")
    disk(PLENTY)
    done = run([*train_command(corpus, folder), "--steps", 4])
    assert done.returncode == 0, done.stderr


def test_a_disk_that_becomes_read_only(corpus, whole, disk):
    INJECTED["disks full or read-only"] += 1
    folder = disk(PLENTY) / "run"
    done = run([*train_command(corpus, folder), "--set", "sample_tokens=0", "--steps", 8])
    assert done.returncode == 0, done.stderr
    before = bits(folder)
    disk(PLENTY, "ro")
    done = run([*resume_command(folder), "--steps", 12])
    assert_one_sentence(done, "Read-only file system")
    assert bits(folder) == before
    scored = flashlm("eval", folder)  # reading needs no writing
    assert scored.returncode == 0, scored.stderr
    assert_one_sentence(flashlm("export", folder, folder / "model.safetensors"), "Read-only file system")


def test_prepare_without_room_goes_on_to_the_same_bytes(corpus_files, tmp_path, disk):
    INJECTED["disks full or read-only"] += 1
    text = tmp_path / "long.jsonl"
    lines = (corpus_files / "train.jsonl").read_text().splitlines()
    text.write_text("".join(line.replace('"text": "', f'"text": "{i} ') + "\n" for i in range(40) for line in lines))
    there = flashlm("prepare", text, "--out", tmp_path / "there")
    assert there.returncode == 0, there.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "there").iterdir()) // 1024
    place = disk(size // 2) / "tokens"
    done = flashlm("prepare", text, "--out", place)
    assert_one_sentence(done, "is full: free some space and run the same command again")
    disk(PLENTY)
    done = flashlm("prepare", text, "--out", place)
    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "there").glob("*.bin"):
        assert (place / file.name).read_bytes() == file.read_bytes()
    assert (place / "manifest.json").read_text() == (tmp_path / "there" / "manifest.json").read_text()


def test_an_export_without_room_leaves_nothing(whole, disk):
    INJECTED["disks full or read-only"] += 1
    place = disk(64)
    done = flashlm("export", whole, place / "model.safetensors")
    assert_one_sentence(done, "could not be written", "free some disk space")
    assert list(place.iterdir()) == []
