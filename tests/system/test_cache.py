"""Where the built-in text and the embedding's start are kept when the user's cache folder cannot be written."""

import os
import stat
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from helpers import TINY

from flashlm_numba.kernels._cache import temporary_root, user_root
from flashlm_numba.system.cache import from_cache, writable_cache
from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.training import inputs


@pytest.fixture
def blocked(tmp_path, monkeypatch):
    """The environment of a user whose cache folder lies below a file; the temporary folder is tmp_path/tmp."""
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def usual(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_users_cache_is_used_where_it_can_be_written(usual):
    assert writable_cache("a") == usual / "cache" / "flashlm-numba" / "a"
    assert writable_cache("a").is_dir()


def test_a_temporary_folder_of_fixed_name_takes_its_place(blocked):
    folder = writable_cache("a")
    assert folder.parent.parent == blocked / "tmp"
    assert folder == writable_cache("a") == temporary_root() / "a"
    (folder / "thing").write_text("kept")
    assert from_cache("a/thing", lambda path: path.read_text() if path.is_file() else None) == "kept"
    assert from_cache("a/other", lambda path: path.read_text() if path.is_file() else None) is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize("trick", ["open to all", "link"])
def test_a_temporary_folder_that_others_may_write_is_not_used(blocked, trick):
    root = temporary_root()
    if trick == "link":
        (blocked / "elsewhere").mkdir(mode=0o700)
        root.symlink_to(blocked / "elsewhere")
    else:
        root.mkdir()
        root.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
    (root / "thing").touch()
    assert from_cache("thing", lambda path: path if path.exists() else None) is None
    with pytest.raises(UserError, match=r"Neither .*file/cache.* nor .*tmp/flashlm.* can be written; set the env"):
        writable_cache("a")


def test_training_without_a_writable_cache_says_so_once_and_works(blocked, tmp_path):
    """Text, embedding and kernels, in a process of its own; a second run finds the text and the embedding there."""
    from flashlm_numba.kernels import _jit

    settings = [s for s in TINY if not s.startswith(("embedding_init", "dim", "groups"))] + ["dim=8", "groups=2"]
    command = [sys.executable, "-m", "flashlm_numba", "train", "--steps", "1", "--head", "dense"]
    command += [part for setting in settings for part in ("--set", setting)]
    kernels = {"NUMBA_CACHE_DIR": str(_jit.CACHE_FOLDER.parent)}  # compiled already
    said = []
    for name in ("one", "two"):
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name)],
            env={**os.environ, **kernels},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    user, temporary = user_root(), temporary_root()
    assert f"The cache folder {user} cannot be written, so {temporary} is used" in said[0]
    assert f"cached in {temporary / 'embeddings'}" in said[0]
    assert "cannot be written" not in said[1]
    assert "computing the initial embedding" not in said[1]
    (rows,) = (temporary / "embeddings").glob("*.npz")
    with np.load(rows) as found:
        assert found["rows"].shape == (50_257, 8)


def test_the_built_in_text_is_prepared_apart_whatever_else_the_cache_holds(tmp_path, monkeypatch):
    """Training keeps no memory of preparing: a corpus of another key, or a damaged one, does not count as there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))  # the cache in its place, if there is one
    (tmp_path / "flashlm-numba" / "corpus-0123456789abcdef").mkdir(parents=True)
    (tmp_path / "flashlm-numba" / "corpus-0123456789abcdef" / "manifest.json").write_text("{}")
    apart, notes = [], []
    monkeypatch.setattr(inputs, "run_apart", lambda arguments, quiet: apart.append((arguments, quiet)))
    monkeypatch.setattr(inputs, "default_corpus", lambda: tmp_path)
    progress = Progress()
    progress.note = notes.append
    assert inputs.training_data(None, progress) == tmp_path
    assert apart == [(["-m", "flashlm_numba", "prepare"], True)]
    assert "Preparing the built-in text" in notes[-1]
