"""Folders that are moved away, changed or shared while a run needs them, and a process that sleeps."""

import shutil
import signal
import time

import pytest
from programs import (
    INJECTED,
    assert_every_checkpoint_is_whole,
    begin,
    bits,
    count_lines,
    losses,
    resume_command,
    train_command,
    wait_for_lines,
)


def _started(tokens, folder):
    """A training process that is at work."""
    process = begin(train_command(tokens, folder))
    wait_for_lines(process, folder, 20)
    assert process.poll() is None, process.communicate()
    return process


def _stop(process):
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def _end(command):
    process = begin(command)
    said = process.communicate(timeout=240)[1]
    assert "Traceback" not in said, said
    return process.returncode, said


@pytest.fixture
def tokens(corpus, tmp_path):
    """A corpus of its own, to be moved."""
    return shutil.copytree(corpus, tmp_path / "tokens")


def test_data_moved_away_after_a_stop_is_missed_by_name_and_the_run_goes_on_when_it_is_back(tokens, whole, tmp_path):
    INJECTED["folders moved away"] += 1
    folder = tmp_path / "run"
    _stop(_started(tokens, folder))
    tokens.rename(tmp_path / "elsewhere")
    code, said = _end(resume_command(folder))
    assert code == 1
    assert str(tokens) in said
    assert sum(line.startswith("Error: ") for line in said.splitlines()) == 1, said
    assert_every_checkpoint_is_whole(folder)
    (tmp_path / "elsewhere").rename(tokens)
    assert _end(resume_command(folder))[0] == 0
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)


@pytest.mark.slow
def test_data_removed_under_a_run_does_not_disturb_it(tokens, whole, tmp_path):
    """The shards are mapped when it starts, and Linux keeps a mapped file until nobody reads it."""
    INJECTED["folders removed"] += 1
    folder = tmp_path / "run"
    process = _started(tokens, folder)
    shutil.rmtree(tokens)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)


def test_a_shard_changed_between_a_stop_and_a_resume_is_refused(tokens, tmp_path):
    INJECTED["shards changed"] += 1
    folder = tmp_path / "run"
    _stop(_started(tokens, folder))
    before = bits(folder)
    shard = tokens / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    code, said = _end(resume_command(folder))
    assert code == 1
    assert "train-00000.bin" in said
    assert bits(folder) == before


def test_a_second_run_in_the_folder_is_refused_and_the_first_undisturbed(corpus, whole, tmp_path):
    INJECTED["two runs in a folder"] += 2
    folder = tmp_path / "run"
    first = _started(corpus, folder)
    first.send_signal(signal.SIGSTOP)  # it must not end before the others come
    for command in (resume_command(folder), train_command(corpus, folder)):
        code, said = _end(command)
        assert code in (1, 2)
        assert str(folder) in said.replace("\n", "")
    first.send_signal(signal.SIGCONT)
    said = first.communicate(timeout=240)[1]
    assert first.returncode == 0, said
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)


@pytest.mark.slow
def test_a_process_that_sleeps(corpus, whole, tmp_path):
    INJECTED["sleeps"] += 1
    folder = tmp_path / "run"
    process = _started(corpus, folder)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    asleep = count_lines(folder)
    time.sleep(0.5)
    assert count_lines(folder) == asleep
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)
