"""Regions under each threading layer: entered from two threads at the same time, and in forked children."""

import os
import subprocess
import sys

import numba
import pytest

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has no threading layer")
HAS_FORK = hasattr(os, "fork")

START = """
import multiprocessing, os, sys, threading
import numba, numpy as np
from flashlm_numba import DenseHead

rng = np.random.default_rng(0)
head = DenseHead(rng.standard_normal((2_000, 16), np.float32))
h, targets = rng.standard_normal((64, 16), np.float32), rng.integers(0, 2_000, 64).astype(np.int32)

def score(_=None):
    return head.log_prob(h, targets)

def in_child():
    child = os.fork()
    if child == 0:
        try:
            score()
        except RuntimeError as error:
            print(error, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""

THREADS = """
expected = score()
def work():
    for _ in range(200):
        if not np.array_equal(score(), expected):
            os._exit(4)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(numba.threading_layer())
"""

FORK = "score()\nprint('status', in_child(), flush=True)\nscore()\n"
# Numba's threads run although no kernel did
FORK_AFTER_A_LOOK = "numba.get_num_threads()\nprint('status', in_child(), flush=True)\n"
FORK_BEFORE = "print('status', in_child(), flush=True)\nscore()\n"
FORK_ON_ONE_THREAD = "numba.set_num_threads(1)\n" + FORK
# what needs no region works: drawing tokens
FORK_AND_DRAW = """
head.sample(h[:1], np.random.default_rng(0))
score()
child = os.fork()
if child == 0:
    head.sample(h[:1], np.random.default_rng(0))
    os._exit(0)
print('status', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
WORKERS = """
if __name__ == "__main__":
    expected = score()
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        try:
            print('equal', all(np.array_equal(found, expected) for found in pool.map(score, range(4))))
        except RuntimeError as error:
            print(error)
"""


def run(program, *arguments, layer, tmp_path):
    """Output lines of a program, which must end by itself."""
    if layer == "tbb":
        pytest.importorskip("numba.np.ufunc.tbbpool", reason="tbb is not installed", exc_type=ImportError)
    path = tmp_path / "program.py"  # a file, because spawn imports it
    path.write_text(START + program)
    environment = os.environ | {"NUMBA_THREADING_LAYER": layer, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    done = subprocess.run(
        [sys.executable, path, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_threads_may_enter_regions_at_the_same_time(layer, tmp_path):
    """Numba's workqueue ends the process ("Concurrent access has been detected") unless they take turns."""
    assert run(THREADS, layer=layer, tmp_path=tmp_path) == [layer]


@pytest.mark.skipif(not HAS_FORK, reason="no fork on this system")
@pytest.mark.parametrize("program", [FORK, FORK_AFTER_A_LOOK, FORK_ON_ONE_THREAD])
def test_a_forked_child_gets_a_sentence_instead_of_a_signal(program, tmp_path):
    message, status = run(program, layer="omp", tmp_path=tmp_path)
    assert status == "status 3"
    for part in ("forked after Numba had started its threads", "spawn", "NUMBA_THREADING_LAYER=workqueue"):
        assert part in message


@pytest.mark.skipif(not HAS_FORK, reason="no fork on this system")
@pytest.mark.parametrize(
    ("program", "layer"),
    [(FORK, "workqueue"), (FORK_BEFORE, "omp"), (FORK_BEFORE, "workqueue"), (FORK_AND_DRAW, "omp"), (FORK, "tbb")],
)
def test_forks_that_may_compute(program, layer, tmp_path):
    """The message's remedies: another layer, or a fork before the first computation. Drawing needs no region."""
    assert run(program, layer=layer, tmp_path=tmp_path) == ["status 0"]


@pytest.mark.skipif(not HAS_FORK, reason="no fork on this system")
@pytest.mark.parametrize(
    ("method", "layer", "found"),
    [("spawn", "omp", "equal True"), ("fork", "workqueue", "equal True"), ("fork", "omp", "This process was forked")],
)
def test_multiprocessing(method, layer, found, tmp_path):
    (line,) = run(WORKERS, method, layer=layer, tmp_path=tmp_path)
    assert line.startswith(found)
