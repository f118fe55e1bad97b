"""A user without HOME and without an entry in passwd, as of `docker run --user 1042`."""

import os
import subprocess
import sys

import pytest
from helpers import TINY
from programs import INJECTED

from flashlm_numba.kernels import _jit

# read by every Python process that has this folder on PYTHONPATH
NO_ENTRY = """
import pwd
def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = getpwuid
"""


@pytest.fixture
def stranger(tmp_path):
    """The environment of such a user, whose working folder is tmp_path/work."""
    for name in ("work", "tmp", "python"):
        (tmp_path / name).mkdir()
    (tmp_path / "python" / "sitecustomize.py").write_text(NO_ENTRY)
    unset = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "HF_HOME")
    found = {name: value for name, value in os.environ.items() if name not in unset}
    paths = os.pathsep.join(filter(None, [str(tmp_path / "python"), os.environ.get("PYTHONPATH")]))
    return found | {
        "PYTHONPATH": paths,
        "TMPDIR": str(tmp_path / "tmp"),
        "NUMBA_CACHE_DIR": str(_jit.CACHE_FOLDER.parent),
    }


def run(stranger, tmp_path, *words):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=tmp_path / "work",
        env=stranger,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.name != "posix", reason="passwd is of POSIX")
def test_training_uses_the_temporary_folder(stranger, tmp_path, corpus):
    INJECTED["users without a home"] += 1
    settings = [s for s in TINY if not s.startswith(("embedding_init", "dim", "groups"))] + ["dim=8", "groups=2"]
    words = [word for setting in settings for word in ("--set", setting)]
    train = ("train", corpus, "--out", "run", "--steps", 1, "--threads", 1, "--head", "dense", *words)
    done = run(stranger, tmp_path, "-m", "flashlm_numba", *train)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "tmp" / f"flashlm-numba-{os.getuid()}"
    assert len(list((kept / "embeddings").iterdir())) == 1
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["run"]  # no folder named ~


@pytest.mark.skipif(os.name != "posix", reason="passwd is of POSIX")
@pytest.mark.parametrize("home", [None, "relative/home"])
def test_every_cache_has_a_folder(stranger, tmp_path, home):
    INJECTED["users without a home"] += 1
    del stranger["NUMBA_CACHE_DIR"]
    if home is not None:
        stranger["HOME"] = home
    program = (
        "import os\n"
        "from flashlm_numba.kernels import _jit\n"
        "from flashlm_numba.system.cache import set_hub_home, writable_cache\n"
        "set_hub_home()\n"
        "print(_jit.CACHE_FOLDER.parent, writable_cache(), os.environ['HF_HOME'], _jit.CACHE_IS_TEMPORARY, sep='\\n')\n"
    )
    done = run(stranger, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    kept = str(tmp_path / "tmp" / f"flashlm-numba-{os.getuid()}")
    assert done.stdout.splitlines() == [kept, kept, f"{kept}/huggingface", "False"]
    assert list((tmp_path / "work").iterdir()) == []
