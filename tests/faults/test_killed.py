"""SIGKILL at random moments, SIGINT and SIGTERM: nothing is lost, and the run ends as one that nothing happened to."""

import contextlib
import random
import signal
import subprocess
import time

import pytest
from programs import (
    INJECTED,
    KILLS,
    STEPS,
    assert_every_checkpoint_is_whole,
    begin,
    bits,
    count_lines,
    losses,
    resume_command,
    train_command,
    wait_for_lines,
)


def test_killed_at_random_moments_ends_as_if_nothing_had_happened(corpus, whole, tmp_path):
    """Of each process the moment is counted from a random step, so steps, validations and savings are all hit."""
    folder, dice, killed = tmp_path / "killed", random.Random(1), 0
    while killed < KILLS:
        new = not (folder / "config.json").exists()
        process = begin(train_command(corpus, folder) if new else resume_command(folder))
        before = count_lines(folder)
        if killed % 5 == 4:  # while it starts
            time.sleep(dice.uniform(0, 2))
        else:
            wait_for_lines(process, folder, before + dice.randrange(1, max(2, 2 * STEPS // (KILLS + 1))))
            time.sleep(dice.uniform(0, 0.05))
        if process.poll() is not None:  # it was done before
            process.communicate()
            break
        process.kill()
        INJECTED["kills"] += 1
        process.communicate()
        killed += 1
        assert_every_checkpoint_is_whole(folder)
    assert killed > 0
    done = subprocess.run(resume_command(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)
    left_over = [path.name for path in folder.rglob("*") if ".tmp" in path.name]
    assert left_over == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_twice_in_a_row_by_a_signal(corpus, whole, tmp_path, number):
    folder = tmp_path / "stopped"
    for command in (train_command(corpus, folder), resume_command(folder)):
        process = begin(command)
        wait_for_lines(process, folder, count_lines(folder) + 10)
        process.send_signal(number)
        INJECTED["signals"] += 1
        _, said = process.communicate(timeout=60)
        assert process.returncode == 128 + number, said
        assert "resume with: flashlm-numba train --resume" in said
        assert "Traceback" not in said
        assert_every_checkpoint_is_whole(folder)
    done = subprocess.run(resume_command(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)


@pytest.mark.slow
def test_a_second_signal_at_once_ends_without_saving_and_loses_no_checkpoint(corpus, whole, tmp_path):
    folder = tmp_path / "impatient"
    process = begin(train_command(corpus, folder))
    wait_for_lines(process, folder, 20)
    process.send_signal(signal.SIGINT)
    INJECTED["signals"] += 1
    said = ""
    while "interrupt again to stop without saving" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)  # while it finishes the step, or saves
        INJECTED["signals"] += 1
    said += process.communicate(timeout=60)[1]
    assert process.returncode in (1, 130), said
    assert "Traceback" not in said, said
    assert_every_checkpoint_is_whole(folder)
    done = subprocess.run(resume_command(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert bits(folder) == bits(whole)
