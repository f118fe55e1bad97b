"""A working folder with files that are named as modules: the program and its own processes import none of them."""

import os
import subprocess
import sys

import pytest
from helpers import TINY
from programs import INJECTED

from flashlm_numba.system.process import PYTHON, environment

MODULES = ("random.py", "json.py", "typing.py", "pathlib.py", "torch.py", "numba.py", "numpy", "tiktoken", "click")
STOP = "raise SystemExit('a file of the working folder was imported')\n"


def fill(folder, names):
    for name in names:
        path = folder / name if name.endswith(".py") else folder / name / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(STOP)


@pytest.mark.parametrize("start", ["python -m", pytest.param("the command", marks=pytest.mark.slow)])
def test_training_imports_nothing_from_the_working_folder(corpus, tmp_path, start):
    """With the start from the corpus, which another process computes."""
    INJECTED["folders with modules"] += 1
    fill(tmp_path, MODULES)
    if start == "the command":
        # as the command's script, which does not look in the working folder: it may hold a package of our name too
        fill(tmp_path, ["flashlm_numba"])
        python = PYTHON
    else:
        (tmp_path / "flashlm_numba").mkdir()  # no package, as it has no __init__.py
        python = (sys.executable,)
    settings = [s for s in TINY if not s.startswith("embedding_init")] + ["head.name=dense"]
    words = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [*python, "-m", "flashlm_numba", "train", corpus, "--out", "run", "--steps", "2", "--threads", "1", *words],
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": kernels()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()
    assert "computing the initial embedding" in done.stderr


@pytest.mark.parametrize("start", ["-P -m", "the command"])
def test_starts_before_which_python_imports_nothing_from_there(tmp_path, start):
    """`python -m` imports some of these before the program begins; docs/tutorial.md names these two starts instead."""
    INJECTED["folders with modules"] += 1
    folder, script = tmp_path / "folder", tmp_path / "bin" / "flashlm-numba"
    for path in (folder, script.parent):
        path.mkdir()
    fill(folder, ("types.py", "runpy.py", "warnings.py", "functools.py", "collections", "contextlib.py"))
    script.write_text("from flashlm_numba.__main__ import run\nrun()\n")  # as pip makes it
    words = ["-P", "-m", "flashlm_numba"] if start == "-P -m" else [script]
    command = [sys.executable, *words, "--version"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.startswith("flashlm-numba, version"), done.stderr


def kernels():
    from flashlm_numba.kernels import _jit

    return str(_jit.CACHE_FOLDER.parent)


def test_our_processes_do_not_put_packages_before_pythons_own(tmp_path, monkeypatch):
    """PYTHONPATH comes before the standard library, so the folder of installed packages must not be added to it."""
    from flashlm_numba.system import process

    monkeypatch.delenv("PYTHONPATH", raising=False)
    installed, checkout = (tmp_path / name for name in ("site-packages", "checkout"))
    monkeypatch.setattr(process, "__file__", str(installed / "flashlm_numba" / "system" / "process.py"))
    assert "PYTHONPATH" not in environment()
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert environment()["PYTHONPATH"] == "/mine"
    monkeypatch.setattr(process, "__file__", str(checkout / "flashlm_numba" / "system" / "process.py"))
    assert environment()["PYTHONPATH"] == os.pathsep.join([str(checkout), "/mine"])
    assert environment(A="b")["A"] == "b"
