"""A program that is run to its end, and its signals."""

import signal
import subprocess
import sys

import pytest
from click import ClickException

from tools.bench import processes
from tools.bench.machine import ROOT


def test_a_signal_is_passed_on_and_waited_for():
    """Only the tool gets it, as with kill; the run saves, and only then does the tool end."""
    # not SIGINT, which a job in the background ignores
    child = (
        "import os, signal, sys, time; signal.signal(15, lambda *a: (time.sleep(1), print('saved', file=sys.stderr), "
    )
    child += "sys.exit(143))); os.write(2, b'up\\n'); time.sleep(60)"
    code = f"from tools.bench import processes; processes.run_process(['-c', {child!r}])"
    tool = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert tool.stderr.readline() == "up\n"
    tool.send_signal(signal.SIGTERM)
    _, shown = tool.communicate(timeout=60)
    assert tool.returncode == 1
    assert shown.startswith("saved\n")
    assert "Stopped by SIGTERM" in shown


@pytest.mark.parametrize(("status", "failure"), [(1, processes.RunFailed), (130, ClickException)])
def test_a_process_that_was_stopped_stops_the_tool(status, failure):
    with pytest.raises(ClickException, match=f"ended with status {status}") as caught:
        processes.run_process(["-c", f"raise SystemExit({status})"])
    assert type(caught.value) is failure
