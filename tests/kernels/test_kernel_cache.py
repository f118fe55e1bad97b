"""The files of compiled kernels: damaged, missing and read-only ones, and the folders that they are in."""

import os
import stat
import sys
import tempfile
import warnings

import numba
import pytest

from flashlm_numba.kernels import _cache, _jit
from flashlm_numba.system import compiled
from flashlm_numba.system.display import Progress

compiles = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="nothing is compiled")


def add(a, b):
    return a + b


def call(folder):
    """add(1, 2) with its cache in folder, as a new process would; and whether it was loaded."""
    made = numba.njit(add)
    made._cache = _cache.cache_for(folder)(add)
    assert made(1, 2) == 3
    return bool(made.stats.cache_hits)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with one compiled function: path and content of each file."""
    folder = tmp_path_factory.mktemp("cache")
    if numba.config.DISABLE_JIT:
        return folder, {}
    assert not call(folder)
    assert call(folder)
    return folder, {path: path.read_bytes() for path in folder.rglob("*.nb?")}


@pytest.fixture
def files(whole):
    """The same, and what it held at first when the test ends."""
    yield whole
    for path, content in whole[1].items():
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)


@compiles
def test_a_file_cut_at_any_length_or_with_any_byte_changed_is_noticed(whole):
    for content in whole[1].values():
        assert _cache.unsealed(content) is not None
        for length in range(len(content)):
            assert _cache.unsealed(content[:length]) is None
        for place in range(0, len(content), 97):
            changed = bytearray(content)
            changed[place] ^= 1
            assert _cache.unsealed(bytes(changed)) is None


@compiles
@pytest.mark.parametrize("kind", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", ["empty", "half", "a byte less", "garbage", "a byte", "another's", "removed"])
def test_a_damaged_file_is_compiled_anew_with_a_warning(files, kind, damage):
    folder, contents = files
    (path,) = (path for path in contents if path.suffix == kind)
    content = contents[path]
    changed = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "a byte less": content[:-1],
        "garbage": bytes(range(256)) * 9,
        "a byte": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "another's": next(other for name, other in contents.items() if name != path)[:-1],
    }
    if damage == "removed":
        path.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not call(folder)
    else:
        path.write_bytes(changed[damage])
        with pytest.warns(_cache.CacheWarning, match="are damaged; they are compiled anew"):
            assert not call(folder)
    assert call(folder)  # in order again


@compiles
def test_a_folder_that_cannot_be_written_is_read(files, monkeypatch):
    """As root, no folder is read-only: the writes are made to fail."""
    folder, contents = files

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(_cache.Path, "write_bytes", refuse)
    assert call(folder)
    next(path for path in contents if path.suffix == ".nbc").unlink()
    for _ in range(2):
        assert not call(folder)  # compiled, and not stored


@compiles
def test_a_file_system_that_cannot_rename_over_a_file(files, monkeypatch):
    folder, contents = files

    def refuse(source, target):
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(_cache.os, "replace", refuse)
    for path in contents:
        path.write_bytes(b"")
    with pytest.warns(_cache.CacheWarning):
        assert not call(folder)
    assert call(folder)
    _cache.write_mark(folder / "complete-1", next(iter(contents)).parent)
    assert _cache.lost_files(folder / "complete-1", next(iter(contents)).parent) == []
    assert not list(folder.rglob("*.tmp"))


def test_a_mark_names_the_files_and_finds_those_that_are_lost(tmp_path):
    mark, folder = tmp_path / "complete-1", tmp_path / "kernels"
    folder.mkdir()
    for name in ("a.nbi", "a.1.nbc", "b.nbi"):
        (folder / name).write_bytes(_cache.sealed(name.encode()))
    assert _cache.lost_files(mark, folder) is None
    _cache.write_mark(mark, folder)
    assert _cache.lost_files(mark, folder) == []
    (folder / "a.1.nbc").unlink()
    (folder / "b.nbi").write_bytes(b"")
    (folder / "c.nbi").write_bytes(b"another's, not named")
    assert _cache.lost_files(mark, folder) == [folder / "a.1.nbc", folder / "b.nbi"]
    _cache.remove_damaged(folder)
    assert [path.name for path in _cache.compiled_files(folder)] == ["a.nbi"]
    content = mark.read_bytes()
    for length in range(len(content)):
        mark.write_bytes(content[:length])
        assert _cache.lost_files(mark, folder) is None


class Notes(Progress):
    """Progress that keeps the sentences."""

    def __init__(self):
        self.notes = []

    def note(self, line):
        self.notes.append(line)


@compiles
@pytest.mark.parametrize("damage", ["removed", "halved", "mark emptied"])
def test_ensure_compiled_looks_at_the_files_that_the_mark_names(tmp_path, monkeypatch, damage):
    mark, folder = tmp_path / f"{_jit.COMPLETE}-float", tmp_path
    for name in ("a.nbi", "a.1.nbc"):
        (folder / name).write_bytes(_cache.sealed(name.encode()))
    progress = Notes()
    monkeypatch.setattr(_jit, "CACHE_FOLDER", tmp_path)
    monkeypatch.setattr(compiled, "PYTHON", (sys.executable, "-c", "print('compiled 0 0')"))
    _jit.mark_compiled("float")
    compiled.ensure_compiled(["float"], progress)
    assert progress.notes == []
    assert _jit.is_compiled("float")
    assert not _jit.is_compiled("int8")
    if damage == "removed":
        (folder / "a.1.nbc").unlink()
    elif damage == "halved":
        (folder / "a.1.nbc").write_bytes((folder / "a.1.nbc").read_bytes()[:20])
    else:
        mark.write_bytes(b"")
    compiled.ensure_compiled(["float"], progress)
    assert "Compiling the kernels" in progress.notes[-1]
    if damage != "mark emptied":
        assert progress.notes[0] == f"Compiled kernels in {tmp_path} are missing or damaged (1 file)."
        assert not (folder / "a.1.nbc").exists()  # compiled anew without a warning of its own


# --- folders ---


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A user's cache that cannot be made, and a temporary folder."""
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def test_the_temporary_folder_is_the_same_for_every_process(places):
    folder = _jit.cache_folder()
    assert folder == _cache.temporary_root() / _jit.folder_name()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert _jit.cache_folder() == folder


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_a_temporary_folder_of_somebody_elses_is_not_used(places):
    root = _cache.temporary_root()
    root.mkdir()
    root.chmod(0o777)
    folder = _jit.cache_folder()
    assert root not in folder.parents
    assert folder.is_dir()


def fail(*names, **options):
    raise RuntimeError("could not determine the home directory")


@pytest.mark.parametrize("answer", [lambda *names, **options: "~/.cache/flashlm-numba", fail], ids=["older", "newer"])
def test_without_a_home_no_folder_is_made_in_the_working_folder(tmp_path, monkeypatch, answer):
    """Versions of platformdirs differ in their answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(_cache.platformdirs, "user_cache_dir", answer)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not _cache.is_writable(_cache.user_root())
    assert _jit.cache_folder() == _cache.temporary_root() / _jit.folder_name()
    assert [path.name for path in tmp_path.iterdir()] == [_cache.temporary_root().name]


def test_a_complete_cache_is_used_where_it_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    folder = tmp_path / _jit.folder_name()
    folder.mkdir(mode=0o700)
    (folder / "a.nbi").write_bytes(_cache.sealed(b"a"))
    writable = _cache.is_writable
    monkeypatch.setattr(_cache, "is_writable", lambda path: path != folder and writable(path))
    assert _jit.cache_folder() != folder  # not complete
    _cache.write_mark(folder / f"{_jit.COMPLETE}-{_jit.WHOLE}", folder)
    assert _jit.cache_folder() == folder
    (folder / "a.nbi").write_bytes(b"")
    assert _jit.cache_folder() != folder
