"""The kernels' compilation: shared out among processes, shown by a bar, and never trusted when it was cut short."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flashlm_numba.heads import HEADS
from flashlm_numba.model import build
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.system.errors import UserError
from flashlm_numba.training import precompile
from flashlm_numba.training.kernel_tasks import TASKS, Task

PARTS = {task.part for task in TASKS.values()}


@pytest.mark.parametrize("head", HEADS)
def test_every_use_of_a_model_names_parts_that_tasks_compile(head):
    run = from_recipe("default", [f"head.name={head}"])
    for use in build._PARTS:
        assert set(build.kernel_parts(run, [use])) <= PARTS


def test_every_part_is_needed_by_some_use():
    kinds = "float", "int8"
    runs = [from_recipe("default", [f"head.name={head}", f"activations={kind}"]) for head in HEADS for kind in kinds]
    runs += [from_recipe("mmf"), from_recipe("mmf", ["head.name=tree"])]
    assert {part for run in runs for part in build.kernel_parts(run, build._PARTS)} == PARTS


def test_generating_needs_no_backward_pass_and_no_other_head():
    run = from_recipe("default", ["head.name=tree", "activations=float"])
    assert build.kernel_parts(run, ["generate", "whole"]) == ["float", "forward", "decoding", "copies", "tree-whole"]
    adding = from_recipe("default", ["head.name=tree", "activations=float", "ngram_copy_output=add"])
    assert build.kernel_parts(adding, ["generate", "whole"]) == ["float", "forward", "decoding", "tree-whole"]
    assert build.kernel_parts(run, ["generate", "int8"])[-1] == "int8"


# --- the process that shares out the tasks, with processes that only pretend to compile ---

GOOD = "import sys\nfor line in sys.stdin:\n    print('noise\\nfunction\\nfunction\\ntask', flush=True)"


@pytest.fixture
def pretend(monkeypatch):
    """Replaces the processes by a program, and the tasks by five; returns what was marked as compiled."""
    marked, started = [], []

    def install(program, cores=2, free=None):
        tasks = {f"task {i}": Task("a" if i else "b", lambda: None, i, 3) for i in range(5)}
        monkeypatch.setattr(precompile, "TASKS", tasks)
        monkeypatch.setattr(precompile, "available_cores", lambda: cores)
        monkeypatch.setattr(precompile, "available_mb", lambda: free)
        monkeypatch.setattr(precompile, "worker_command", lambda: started.append(1) or [sys.executable, "-c", program])
        monkeypatch.setattr("flashlm_numba.kernels._jit.mark_compiled", marked.append)
        return marked, started

    return install


def test_tasks_are_shared_out_and_the_bar_reaches_its_end(pretend, capsys):
    marked, started = pretend(GOOD)
    precompile.compile_parts(["a"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["compiled", "0", "12"]
    assert lines[-1] == ["compiled", "12", "12"]
    counts = [int(count) for _, count, _ in lines]
    assert counts == sorted(counts)
    assert marked == ["a"]
    assert len(started) == 2


@pytest.mark.parametrize(("cores", "free", "processes"), [(8, None, 4), (8, 1_500, 2), (8, 300, 1), (1, None, 1)])
def test_no_more_processes_than_cores_tasks_and_memory_allow(pretend, cores, free, processes):
    _, started = pretend(GOOD, cores, free)
    precompile.compile_parts(["a"])
    assert len(started) == processes


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 ended a process .* memory ran out"),
        (
            "raise SystemExit('The kernels could not be compiled: no space.')",
            r"^The kernels could not be compiled: no s",
        ),
        ("raise ZeroDivisionError('why')", r"^The kernels could not be compiled: ZeroDivisionError: why\.$"),
        ("import sys; sys.exit(3)", "a process ended with status 3"),
        ("print('function')", "a process ended with status 0"),
    ],
)
def test_a_process_that_fails_gives_a_sentence_and_no_mark(pretend, program, sentence):
    marked, _ = pretend(program)
    with pytest.raises(UserError, match=sentence):
        precompile.compile_parts(["a", "b"])
    assert not marked


def test_the_processes_end_when_the_first_fails(pretend):
    """One fails at once, the other would take a minute."""
    program = "import sys, time\nfor line in sys.stdin:\n    time.sleep(60 if line == 'task 4\\n' else sys.exit(1))"
    pretend(program)
    began = time.monotonic()
    with pytest.raises(UserError):
        precompile.compile_parts(["a"])
    assert time.monotonic() - began < 30


# --- real processes, in an empty cache ---

PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored, as in nohup
from flashlm_numba.kernels import _jit
from flashlm_numba.system.compiled import Compilation
from flashlm_numba.system.display import Progress

class Shown(Progress):
    def advance(self, count):
        print("advance", count, flush=True)

with Compilation([sys.argv[1]], Shown()) as compilation:
    print("started", flush=True)
    compilation.wait()
print("marked", _jit.is_compiled(sys.argv[1]))
"""


def start(part, cache):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, part],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_part_is_compiled_once_and_marked(tmp_path):
    out, errors = start("float", tmp_path).communicate()
    assert "marked True" in out, errors
    counts = [int(line.split()[1]) for line in out.splitlines() if line.startswith("advance")]
    assert sum(counts) == TASKS["float weights"].functions + TASKS["float product"].functions
    files = sorted(path.name for path in tmp_path.rglob("*.nbc"))
    assert any(name.startswith("ternary._ternarize-") for name in files)
    assert not any("forward" in name for name in files)
    out, errors = start("float", tmp_path).communicate()
    assert out.split() == ["started", "marked", "True"], errors
    assert sorted(path.name for path in tmp_path.rglob("*.nbc")) == files


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize(
    ("number", "everyone"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, False)]
)
def test_an_interrupted_compilation_ends_its_processes_and_leaves_no_mark(tmp_path, number, everyone):
    """Ctrl-C reaches all processes of a terminal; other signals only the first of them."""
    process = start("forward", tmp_path)
    assert process.stdout.readline() == "started\n"
    assert process.stdout.readline().startswith("advance")
    (os.killpg if everyone else os.kill)(process.pid, number)
    process.communicate()
    deadline = time.monotonic() + 60
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid)
    assert process.returncode != 0
    assert not list(tmp_path.rglob("complete-*"))


def alive(group):
    """Whether a process of this group runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
