"""A disk that can neither sync a folder, nor lock, nor rename over a file or a folder: training, whole commands."""

import os
import subprocess
import sys

import pytest
from helpers import TINY
from programs import INJECTED, assert_every_checkpoint_is_whole, bits, losses

# read by every Python process that has this folder on PYTHONPATH; the disk is the folder POOR_DISK
POOR = """
import errno, fcntl, os
disk = os.environ["POOR_DISK"]
flock, fsync, replace, rename = fcntl.flock, os.fsync, os.replace, os.rename
def name(file):
    return os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
def on_disk(path):
    return os.fspath(path).startswith(disk)
def fail(number):
    raise OSError(number, os.strerror(number))
def poor_flock(file, operation):
    return fail(errno.ENOLCK) if on_disk(name(file)) else flock(file, operation)
def poor_fsync(file):
    return fail(errno.EINVAL) if on_disk(name(file)) and os.path.isdir(name(file)) else fsync(file)
def moving(move):
    def poor(source, target):
        if on_disk(target) and (os.path.isdir(source) or move is replace and os.path.exists(target)):
            fail(errno.EXDEV if os.path.isdir(source) else errno.EEXIST)
        return move(source, target)
    return poor
fcntl.flock, os.fsync, os.replace, os.rename = poor_flock, poor_fsync, moving(replace), moving(rename)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the faults are made with Linux's /proc")
def test_training_and_resuming_on_a_poor_disk(corpus, tmp_path):
    INJECTED["poor disks"] += 1
    for name in ("python", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(POOR)
    paths = os.pathsep.join(filter(None, [str(tmp_path / "python"), os.environ.get("PYTHONPATH")]))
    folder = tmp_path / "disk" / "run"

    def flashlm(*words):
        done = subprocess.run(
            [sys.executable, "-m", "flashlm_numba", *map(str, words)],
            env=os.environ | {"PYTHONPATH": paths, "POOR_DISK": str(tmp_path / "disk")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if line.startswith("Warning: ")]

    settings = [s for s in TINY if not s.startswith("checkpoint_every")] + ["head.name=dense", "checkpoint_every=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    said = flashlm("train", corpus, "--out", folder, "--steps", 5, "--threads", 1, *words)
    kinds = ("has no locks", "cannot sync to disk", "cannot rename")
    assert [sum(kind in line for line in said) for kind in kinds] == [1, 1, 1]  # each once
    assert_every_checkpoint_is_whole(folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-3", "step-4", "step-5"]
    assert not (folder / ".lock.held").exists()
    before = losses(folder), bits(folder)
    flashlm("train", "--resume", folder, "--checkpoint", "step-3")
    assert (losses(folder), bits(folder)) == before
    assert_every_checkpoint_is_whole(folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        *("step-3", "step-4", "step-5"),
        *("set-aside-step-4", "set-aside-step-5"),
    }
