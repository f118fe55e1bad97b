"""File systems that cannot sync, lock or rename: the work goes on, nothing is lost, and one warning says so."""

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from flashlm_numba.model import checkpoint
from flashlm_numba.system import errors, files
from flashlm_numba.system.errors import PlaceWarning

CANNOT_SYNC = [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF]
CANNOT_RENAME = [errno.EXDEV, errno.EEXIST, errno.EPERM, errno.EBUSY, errno.ENOSYS, errno.EINVAL]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(errors, "_said", set())


def raises(number, when=lambda *arguments: True, instead=None):
    """A function that raises OSError with this number where `when` is true of its arguments."""

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return instead(*arguments, **options)

    return call


def save(run, step):
    files_of = {"model": {"a": np.full(9, step, np.float32)}}
    state = {"step": step, "tokens": 1, "seconds": 1.0, "model_hash": "x"}
    return checkpoint.save(run, step, files_of, state)


def whole(run):
    return {path.name: checkpoint.damage(path) for path in (run / "checkpoints").iterdir()}


def is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("number", CANNOT_SYNC, ids=errno.errorcode.get)
@pytest.mark.parametrize("of", ["folders", "all"])
def test_a_file_system_that_cannot_sync(tmp_path, monkeypatch, number, of):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", raises(number, is_folder if of == "folders" else lambda descriptor: True, fsync))
    with pytest.warns(PlaceWarning, match="cannot sync to disk .* if the power fails"):
        save(tmp_path, 1)
    save(tmp_path, 2)  # once for all of them: a second warning would be an error
    files.write_text(tmp_path / "config.json", "{}")
    files.write_text(tmp_path / "config.json", "{1}")
    assert whole(tmp_path) == {"step-1": None, "step-2": None}
    assert (tmp_path / "config.json").read_text() == "{1}"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_still_told_of(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", raises(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        files.sync_folder(tmp_path)
    with pytest.raises(errors.UserError, match=os.strerror(number)):
        save(tmp_path, 1)


def test_a_folder_that_may_be_written_but_not_read(tmp_path, monkeypatch):
    """Such as one with the mode 0300; the superuser may read it all the same."""
    monkeypatch.setattr(os, "open", raises(errno.EACCES))
    files.sync_folder(tmp_path)


@pytest.mark.parametrize("number", CANNOT_RENAME, ids=errno.errorcode.get)
def test_a_file_system_that_cannot_rename_over_a_file(tmp_path, monkeypatch, number):
    replace = os.replace
    monkeypatch.setattr(os, "replace", raises(number, lambda source, target: os.path.exists(target), replace))
    path = tmp_path / "config.json"
    files.write_text(path, "old")
    with pytest.warns(PlaceWarning, match="cannot rename"):
        files.write_text(path, "new")
    assert path.read_text() == "new"
    files.write_text(path, "newer")
    assert path.read_text() == "newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_file_that_is_mounted_is_written_in_place(tmp_path, monkeypatch):
    """As by `docker run -v config.json:/run/config.json`: it can be neither renamed nor replaced."""
    path = tmp_path / "config.json"
    path.write_text("old")
    refuse = raises(errno.EBUSY)
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.warns(PlaceWarning):
        files.write_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_copy_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", raises(errno.EPERM))
    monkeypatch.setattr(files.shutil, "copyfile", raises(errno.ENOSPC))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OSError, match="No space left"):
            files.write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("which", ["of the image", "all"])
def test_folders_that_cannot_be_renamed(tmp_path, monkeypatch, number, which):
    """A folder of a container's image cannot (EXDEV, by overlayfs); on some of FUSE none can."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    old = {path.name for path in (tmp_path / "checkpoints").iterdir()}

    def refused(source, target):
        return Path(source).is_dir() and (which == "all" or Path(source).name in old)

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, raises(number, refused, getattr(os, name)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in (4, 5):
            save(tmp_path, step)
        assert whole(tmp_path) == {f"step-{step}": None for step in (3, 4, 5)}
        assert checkpoint.set_aside_after(tmp_path, 3) == ["set-aside-step-4", "set-aside-step-5"]
        save(tmp_path, 4)
        assert checkpoint.set_aside_after(tmp_path, 3) == ["set-aside-step-4-2"]
        save(tmp_path, 3)  # again, over itself
    assert len([warning for warning in said if warning.category is PlaceWarning]) <= 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "set-aside-step-4",
        "set-aside-step-4-2",
        "set-aside-step-5",
        "step-3",
    ]
    assert checkpoint.load(tmp_path / "checkpoints" / "set-aside-step-5", "model")["a"][0] == 5
    assert checkpoint.find(tmp_path).name == "step-3"


def test_a_copy_of_a_folder_that_fails_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    for name in ("replace", "rename"):
        refuse = raises(errno.EXDEV, lambda source, target: Path(source).is_dir(), getattr(os, name))
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(files.shutil, "copyfile", raises(errno.ENOSPC))
    with pytest.warns(PlaceWarning), pytest.raises(errors.UserError, match=r"step 2 could not be written .*No space"):
        save(tmp_path, 2)
    assert whole(tmp_path) == {"step-1": None}


def test_a_real_error_of_a_rename_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", raises(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        files.write_text(tmp_path / "a", "b")
    assert list(tmp_path.iterdir()) == []


def test_free_name_counts_from_two(tmp_path):
    assert files.free_name(tmp_path, "a", ".b").name == "a.b"
    for name in ("a.b", "a-2.b"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")  # also taken
    assert files.free_name(tmp_path, "a", ".b").name == "a-3.b"
