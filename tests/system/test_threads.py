"""One thread count for Numba and for NumPy's BLAS, and SciPy's BLAS on one thread."""

from pathlib import Path

import numba
import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from flashlm_numba.system.threads import set_threads

MOST = numba.config.NUMBA_NUM_THREADS


def blas_threads():
    """Threads of NumPy's BLAS and of SciPy's, two libraries where both come from wheels."""
    import scipy.linalg.cython_blas  # noqa: F401 (loads it)

    numpys = Path(np.__file__).resolve().parent
    found = [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]
    mine = [lib for lib in found if Path(lib.filepath).resolve().is_relative_to(numpys.with_name("numpy.libs"))]
    theirs = [lib for lib in found if Path(lib.filepath).resolve().is_relative_to(numpys.with_name("scipy.libs"))]
    assert len(mine) == len(theirs) == 1, [lib.filepath for lib in found]
    return mine[0].num_threads, theirs[0].num_threads


@pytest.fixture(autouse=True)
def restored():
    yield
    set_threads(None)


@pytest.mark.parametrize("threads", range(1, min(MOST, 3) + 1))
def test_set_threads_reaches_numba_and_both_blas_libraries(threads):
    blas_threads()  # SciPy's is loaded before the limit, which must be taken off it again
    ThreadpoolController().select(user_api="blas").limit(limits=2 if threads == 1 else 1)
    assert set_threads(threads) == threads
    assert numba.get_num_threads() == threads
    assert blas_threads() == (threads, 1)


def test_set_threads_takes_every_core_that_it_may_use(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    assert set_threads(None) == numba.get_num_threads() == 1
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(10_000)), raising=False)
    assert set_threads(None) == numba.get_num_threads() == MOST


@pytest.mark.parametrize("threads", [0, -1, MOST + 1])
def test_set_threads_refuses_what_numba_cannot_do(threads):
    before = numba.get_num_threads()
    with pytest.raises(ValueError, match=f"threads must be between 1 and {MOST} on this machine, got {threads}"):
        set_threads(threads)
    assert numba.get_num_threads() == before
