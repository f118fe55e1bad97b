"""The same arithmetic on another number of threads, under every threading layer, without a compiler, beside a fork."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ModelConfig(vocab_size=503, dim=32, ffn_dim=50, groups=4, dilations=(1, 2, 8))
# a few steps of both heads; prints the losses, the layer and the number of threads as JSON
STEPS = """
import json, sys
import numba, numpy as np
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.training.optimizer import Optimizer
from flashlm_numba.system.threads import set_threads
from flashlm_numba.heads.tree_shapes import build_tree

threads = set_threads(None)
config = ModelConfig(vocab_size=97, dim=12, ffn_dim=16, groups=3, dilations=(1, 2), activations=sys.argv[1])
tree = build_tree("adaptive", np.arange(97))
losses = []
for make_head in (DenseHead, lambda weight, dweight: TreeHead(tree, weight, dweight)):
    model = Model(config, initial_parameters(config, 0, embedding_std=0.5), make_head)
    optimizer = Optimizer(model.parameters, model.gradients)
    rng = np.random.default_rng(0)
    for _ in range(2):
        ids, targets = (rng.integers(0, 97, (3, 8)).astype(np.int32) for _ in range(2))
        model.sync_weights()
        loss, _, _ = model.loss_and_grad(ids, targets, np.full(24, 1 / 24, np.float32), accumulate=False)
        optimizer.step(0.02, 1e-3, 1.0)
        losses.append(float(loss.mean()))
layer = "none" if numba.config.DISABLE_JIT else numba.threading_layer()
print(json.dumps({"losses": losses, "layer": layer, "threads": threads}))
"""


def steps(activations="float", **environment):
    done = subprocess.run(
        [sys.executable, "-c", STEPS, activations],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def usual():
    return steps()


@pytest.mark.parametrize("kind", ["dense", "tree"])
def test_a_pass_on_any_number_of_threads_agrees_to_rounding(kind, threads):
    """From the same weights. (Along a training run the last digits grow: a ternary weight flips sooner or later.)"""
    tree = build_tree("adaptive", np.arange(SHAPE.vocab_size))
    found = []
    for count in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        threads(count)
        parameters = initial_parameters(SHAPE, 0, embedding_std=0.5)
        model = Model(SHAPE, parameters, DenseHead if kind == "dense" else lambda w, d: TreeHead(tree, w, d))
        rng = np.random.default_rng(1)
        ids, targets = (rng.integers(0, SHAPE.vocab_size, (5, 67)).astype(np.int32) for _ in range(2))
        loss, _, _ = model.loss_and_grad(ids, targets, np.full(ids.size, 1 / ids.size, np.float32))
        found.append({"loss": loss, **{name: value.copy() for name, value in model.gradients.items()}})
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_allclose(other[name], value, rtol=0, atol=3e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_every_threading_layer_computes_the_same(layer, usual):
    if layer == "tbb":
        pytest.importorskip("numba.np.ufunc.tbbpool", reason="tbb is not installed", exc_type=ImportError)
    found = steps(NUMBA_THREADING_LAYER=layer)
    assert found["layer"] == layer
    assert found["losses"] == usual["losses"]  # the work is divided by us, not by the layer: the same bits


def test_one_thread(usual):
    found = steps(NUMBA_NUM_THREADS="1")
    assert found["threads"] == 1
    assert found["losses"] == pytest.approx(usual["losses"], rel=1e-5)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no way to say which cores to use")
def test_one_core_of_several(usual):
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + STEPS
    done = subprocess.run([sys.executable, "-c", program, "float"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["threads"] == 1
    assert found["losses"] == pytest.approx(usual["losses"], rel=1e-5)


@pytest.mark.parametrize("activations", [pytest.param("float", marks=pytest.mark.slow), "int8"])
def test_without_a_compiler(activations):
    """As plain Python, which is slow. int8's products are whole numbers and rounding moves them by whole steps; plain
    Python does not round the weights' gradients, which tells after the first step.
    """
    compiled, plain = steps(activations), steps(activations, NUMBA_DISABLE_JIT="1")
    assert plain["layer"] == "none"
    assert plain["losses"][::2] == pytest.approx(compiled["losses"][::2], rel=1e-4 if activations == "float" else 1e-2)
    assert plain["losses"] == pytest.approx(compiled["losses"], rel=1e-4 if activations == "float" else 5e-2)


FORKS = """
import os, sys, tempfile
import numpy as np
import numba
from pathlib import Path
from flashlm_numba.model import embedding_init as embeddings
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.heads.dense import DenseHead
from flashlm_numba.data.prepare import prepare
from flashlm_numba.system.threads import set_threads

set_threads(None)
rng = np.random.default_rng(0)
head = DenseHead(rng.standard_normal((2_000, 16), np.float32))
h, targets = rng.standard_normal((64, 16), np.float32), rng.integers(0, 2_000, 64).astype(np.int32)
weights = np.full(64, 1 / 64, np.float32)
before = head.forward_backward(h, targets, weights)[0]
assert numba.threading_layer() == "omp"
folder = Path(tempfile.mkdtemp())
prepare(sys.argv[1], folder / "tokens", workers=3, progress=False)       # several workers
embeddings.cached_start(open_tokens(folder / "tokens"), 8)  # a process of its own
child = os.fork()
if child == 0:  # a child that computes with NumPy and tokenises, but enters no parallel region
    from flashlm_numba.data.vocabularies import vocabulary_named
    assert vocabulary_named("gpt2").encode("one two")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
after = head.forward_backward(h, targets, weights)[0]
assert np.array_equal(before, after)
print("as before")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_openmp_survives_our_workers_and_a_fork(corpus_files, tmp_path):
    """GNU's OpenMP ends a forked child that enters a parallel region: no worker of ours is a fork."""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "omp", "XDG_CACHE_HOME": str(tmp_path)}
    # the kernels' cache where it was: it would be compiled anew
    from flashlm_numba.kernels import _jit

    environment["NUMBA_CACHE_DIR"] = str(_jit.CACHE_FOLDER.parent)
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(corpus_files)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "as before"


def test_no_process_of_ours_is_forked():
    for path in (ROOT / "flashlm_numba").rglob("*.py"):
        assert not re.search(r"os\.fork|ProcessPool|import multiprocessing|num_proc", path.read_text()), path.name
