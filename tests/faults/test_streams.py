"""Standard streams that are closed, full or broken, and a library without them: the work is done all the same."""

import os
import subprocess
import sys

import pytest
from helpers import TINY
from programs import INJECTED, bits

from flashlm_numba.system import display, streams
from flashlm_numba.system.process import run_apart

posix = pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")


def words(*arguments):
    return [sys.executable, "-m", "flashlm_numba", *map(str, arguments)]


def shell(redirections, command, **options):
    """A command in a shell that redirects its streams, and shows what arrives."""
    line = ["sh", "-c", f'exec "$@" {redirections}', "sh", *command]
    return subprocess.run(line, capture_output=True, text=True, check=False, **options)


def train(corpus, folder, redirections):
    settings = [word for setting in (*TINY, "head.name=dense") for word in ("--set", setting)]
    return shell(redirections, words("train", corpus, "--out", folder, "--steps", 2, "--threads", 1, *settings))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "run"
    assert train(corpus, folder, "").returncode == 0
    return folder


@posix
@pytest.mark.parametrize(
    "closed", ["2>&-", pytest.param(">&- 2>&-", marks=pytest.mark.slow), "0<&- >&- 2>&-", ">/dev/full 2>/dev/full"]
)
def test_training_without_its_streams(corpus, undisturbed, tmp_path, closed):
    INJECTED["streams closed or full"] += 1
    done = train(corpus, tmp_path / "run", closed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert bits(tmp_path / "run") == bits(undisturbed)
    for path in (tmp_path / "run").rglob("*.json*"):  # no note went to a file that took descriptor 2
        if path.name == "tokenizer.json":
            assert path.read_bytes() == (undisturbed / "tokenizer.json").read_bytes()
        else:
            assert b"Training" not in path.read_bytes()


@posix
@pytest.mark.parametrize("closed", ["2>&-", ">&-", "0<&- >&- 2>&-"])
@pytest.mark.parametrize("good", [True, False], ids=["a run", "no run"])
def test_a_short_command_without_its_streams(undisturbed, tmp_path, closed, good):
    INJECTED["streams closed or full"] += 1
    done = shell(closed, words("info", undisturbed if good else tmp_path))
    assert done.returncode == (0 if good else 1)
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (good and ">&-" not in closed.replace("2>&-", ""))
    assert done.stderr.count("Error: ") == (not good and "2>&-" not in closed)


@posix
@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        ("1>/dev/full", "Error: The output cannot be written because no space is left."),
        ("1</dev/null", "Error: The output cannot be written: Bad file descriptor; check where standard output goes."),
    ],
)
def test_output_that_cannot_be_written_is_one_sentence(undisturbed, stream, sentence):
    INJECTED["streams closed or full"] += 1
    done = shell(stream, words("info", undisturbed))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [sentence]


@posix
def test_notes_that_nobody_reads_do_not_change_the_status(undisturbed):
    """Python ends with 120 if it cannot empty a stream at the end."""
    INJECTED["streams closed or full"] += 1
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(words("train", "--resume", undisturbed), stderr=write, check=False)
    finally:
        os.close(write)
    assert done.returncode == 0


@posix
@pytest.mark.parametrize("end", ["closed", "full", "broken"])
def test_preparing_needs_nobody_who_reads(corpus_files, tmp_path, end):
    INJECTED["streams closed or full"] += 1
    command = words("prepare", corpus_files, "--out", tmp_path / "tokens")
    if end == "broken":
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, text=True, check=False)
        os.close(write)
    else:
        done = shell({"closed": "2>&-", "full": "2>/dev/full"}[end], command)
        assert done.stderr == ""
    assert done.returncode == 0
    assert "30 documents" in done.stdout
    assert (tmp_path / "tokens" / "manifest.json").exists()


@posix
def test_a_full_pipe_that_does_not_wait_loses_nothing():
    """Another program may have made the pipe non-blocking: Python's streams then drop what does not fit."""
    INJECTED["streams closed or full"] += 1
    program = (
        "import click\n"
        "from flashlm_numba.cli.main import main\n"
        "main.add_command(click.Command('much', callback=lambda: [click.echo('x' * 999) for _ in range(300)]))\n"
        "main(['much'])\n"
    )
    read, write = os.pipe()
    os.set_blocking(write, False)
    with subprocess.Popen([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True) as process:
        os.close(write)
        with open(read, "rb") as file:
            assert len(file.read()) == 300_000
        assert process.communicate() == (None, "")
    assert process.returncode == 0


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_library_without_standard_error_says_nothing_anywhere(monkeypatch, capfd, stream):
    """As under pythonw, where sys.stderr is None: print() would write to standard output."""
    if stream == "closed":
        stream = open(os.devnull, "w")  # noqa: SIM115
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    display.say("a note")
    shown = display.Display()
    with shown.steps(2, 0):
        shown.note("another")
    shown.stopping()
    assert streams.error_descriptor() is None
    run_apart(["-c", "import sys; print('a note', file=sys.stderr)"])
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


@posix
def test_descriptor_two_of_another_file_is_left_alone(tmp_path):
    """A program closes it, and opens a file, which gets its number."""
    program = (
        "import os, sys\n"
        "sys.stderr = None\n"
        "os.close(2)\n"
        "file = open(sys.argv[1], 'w')\n"
        "assert file.fileno() == 2\n"
        "from flashlm_numba.system.display import TERMINAL\n"
        "from flashlm_numba.system.streams import open_standard_streams\n"
        "TERMINAL.stopping(), TERMINAL.note('a note')\n"
        "open_standard_streams()\n"
        "TERMINAL.stopping(), TERMINAL.note('a note')\n"
        "file.write('whole')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "whole"
