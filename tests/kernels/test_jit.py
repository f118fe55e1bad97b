"""The cache of compiled kernels: never stale, and never in the way."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flashlm_numba.kernels import _jit

SOURCES = Path(_jit.__file__).resolve().parent
PROGRAM = """
import numpy as np
from flashlm_numba.kernels.conv import gated_conv_forward
one = np.ones((1, 1, 1), np.float32)
print(gated_conv_forward(one, 0 * one, one, 1, 1)[0][0, 0, 0])
"""


def run_copy(folder, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def copy(tmp_path):
    """A copy of the package whose kernels may be changed."""
    package = tmp_path / "copy" / "flashlm_numba"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    shutil.copytree(SOURCES, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


@pytest.mark.skipif(_jit.numba.config.DISABLE_JIT, reason="nothing is compiled")
def test_a_changed_helper_in_another_file_is_compiled_anew(copy, tmp_path):
    """exp32 is in _math.py, its caller in conv.py: Numba alone would run the old code."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run_copy(copy, **cache) == ["0.5"]  # sigmoid(0) * 1
    path = copy / "flashlm_numba" / "kernels" / "_math.py"
    source = path.read_text()
    changed = source.replace("        return value if x == x else x", "        return np.float32(0)")
    assert changed != source
    path.write_text(changed)
    assert run_copy(copy, **cache) == ["1.0"]  # 1 / (1 + 0)


@pytest.mark.slow
@pytest.mark.skipif(_jit.numba.config.DISABLE_JIT, reason="nothing is compiled")
def test_another_installation_of_the_same_sources_compiles_nothing(copy, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_DEBUG_CACHE": "1"}
    assert "saved" in run_copy(copy, **cache)
    copy.rename(tmp_path / "another")
    for path in (tmp_path / "another").rglob("*.py"):
        os.utime(path, (0, 0))  # when the files were written says nothing
    printed = run_copy(tmp_path / "another", **cache)
    assert "loaded" in printed
    assert "saved" not in printed


def test_source_hash_sees_names_and_text(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    first = _jit.source_hash(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    second = _jit.source_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, _jit.source_hash(tmp_path)}) == 3


def test_a_cache_folder_that_cannot_be_made_is_replaced(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(blocked))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = _jit.cache_folder()
    assert folder.is_dir()
    assert blocked not in folder.parents
    assert folder.parent != _jit.cache_root() == blocked


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_a_cache_folder_that_others_may_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    open_to_all = tmp_path / _jit.folder_name()
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    folder = _jit.cache_folder()
    assert folder != open_to_all


def test_a_cache_is_complete_for_one_compiler_and_processor(monkeypatch):
    """Else a new Numba would compile in the training process, unannounced: see flashlm_numba/training/precompile.py."""
    assert (_jit.folder_name(), _jit._complete()) == (_jit.CACHE_FOLDER.name, _jit.COMPLETE)
    names = {(_jit.CACHE_FOLDER.name, _jit.COMPLETE)}
    for module, name, value in (
        (_jit.sys, "version_info", (99, 0)),
        (_jit.numba, "__version__", "99.0"),
        (_jit.llvmlite, "__version__", "99.0"),
        (_jit.llvmlite.binding, "get_host_cpu_name", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            names.add((_jit.folder_name(), _jit._complete()))
    assert len(names) == 5
