"""Locks where the file system has none: a file that names the process, replaced when that process has ended."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flashlm_numba.data import writer
from flashlm_numba.model import checkpoint
from flashlm_numba.system import errors, locks
from flashlm_numba.system.errors import PlaceWarning, UserError
from flashlm_numba.system.locks import LockedError, is_locked, locked

NO_LOCKS = [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL]
OTHER = """
import fcntl, os, sys, time, warnings
from pathlib import Path
from flashlm_numba.system.locks import LockedError, is_locked, locked
def refuse(*arguments):
    raise OSError(int(sys.argv[2]), "No locks available")
fcntl.flock = refuse
warnings.simplefilter("ignore")
try:
    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        time.sleep(float(sys.argv[3]))
except LockedError as error:
    print(error.advice)
"""


def other(path, number=errno.ENOLCK, seconds=0.0):
    """Another process that locks path on such a file system."""
    words = [sys.executable, "-c", OTHER, str(path), str(number), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def said(process):
    return process.communicate(timeout=60)[0].strip()


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def without_locks(request, monkeypatch):
    """The number of the error that the file system gives."""

    def refuse(*arguments):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(errors, "_said", {"lock"})  # the warning has a test of its own
    return request.param


def test_a_second_process_is_refused_and_a_later_one_not(tmp_path, without_locks):
    path = tmp_path / ".lock"
    with locked(path):
        assert said(other(path, without_locks)) == f"If there is none, delete {path}.held."
        with pytest.raises(LockedError), locked(path):  # nor a second time in this process
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    assert said(other(path, without_locks)) == "locked"


def test_one_warning_says_so(tmp_path, without_locks, monkeypatch):
    monkeypatch.setattr(errors, "_said", set())
    with pytest.warns(PlaceWarning, match="has no locks .*; a file there replaces them"), locked(tmp_path / "a"):
        pass
    with locked(tmp_path / "b"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path, without_locks):
    path = tmp_path / ".lock"
    process = other(path, without_locks, 60)
    assert process.stdout.readline().strip() == "locked"
    with pytest.raises(LockedError), locked(path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock.held").exists()
    assert said(other(path, without_locks)) == "locked"
    with locked(path):
        assert json.loads((tmp_path / ".lock.held").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"host": "another"}, False),  # whether its process lives cannot be seen
        ({"boot": "another"}, True),  # the machine has started anew since
        ({"started": "1"}, True),  # another process has got the number since, as in a container that starts again
        ({"pid": 2**22 + 1}, True),
    ],
    ids=str,
)
def test_what_is_known_of_the_process_that_holds_it(tmp_path, without_locks, change, free):
    mark = tmp_path / ".lock.held"
    parent = locks._process(os.getppid())
    mark.write_text(json.dumps(parent | change))
    if free:
        with locked(tmp_path / ".lock"):
            pass
        assert not mark.exists()
    else:
        with pytest.raises(LockedError), locked(tmp_path / ".lock"):
            pass
        assert mark.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', '{"pid": "x"}'])
def test_a_mark_that_says_nothing_is_left_to_the_user(tmp_path, without_locks, text):
    (tmp_path / ".lock.held").write_text(text)
    with pytest.raises(LockedError, match="If there is none, delete"):  # noqa: SIM117
        with locked(tmp_path / ".lock"):
            pass


@pytest.mark.parametrize("locks_there", [True, False])
def test_waiting_ends_when_the_other_process_does(tmp_path, monkeypatch, locks_there):
    path = tmp_path / ".lock"
    if locks_there:
        release = threading.Event()

        def hold():
            with locked(path):
                release.wait(60)

        holder = threading.Thread(target=hold)
        holder.start()
        while not path.exists():
            time.sleep(0.01)
        threading.Timer(0.3, release.set).start()
        with locked(path, wait=True):
            assert release.is_set()
        holder.join()
        return
    monkeypatch.setattr(errors, "_said", {"lock"})
    monkeypatch.setattr(locks, "_lock", lambda file, wait: (_ for _ in ()).throw(OSError(errno.ENOLCK, "none")))
    process = other(path, seconds=0.5)
    assert process.stdout.readline().strip() == "locked"
    with locked(path, wait=True):
        assert process.wait(5) == 0
    process.stdout.close()


def test_a_run_and_a_corpus_are_protected_there_too(tmp_path, without_locks):
    with checkpoint.lock(tmp_path):
        with (
            pytest.raises(UserError, match=r"Another process is training in .*; wait for it, or stop it\. If there is"),
            checkpoint.lock(tmp_path),
        ):
            pass
        with (
            writer.locked(tmp_path, wait=False),
            pytest.raises(UserError, match=r"Another process is preparing .*another --out\. If there is none, delete"),
            writer.locked(tmp_path, wait=False),
        ):
            pass


def test_another_error_of_locking_is_raised(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"), locked(Path(tmp_path / ".lock")):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists the locks")
def test_a_lock_is_seen_without_being_touched(tmp_path):
    path = tmp_path / "lock"
    assert is_locked(path) is False
    assert not path.exists()
    for _ in range(2):
        with locked(path):
            assert is_locked(path) is True
        assert is_locked(path) is False
    (tmp_path / "lock.held").write_text("")  # of a file system without locks
    assert is_locked(path) is True
