"""Run a program to its end, pass signals on to it, and return its output and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import click

from tools.bench.machine import ROOT


class RunFailed(click.ClickException):
    """A run ended with an error, for example a diverged loss, that does not affect other runs."""


def run_process(arguments: list[str], environment: Mapping[str, str] | None = None) -> tuple[str, float]:
    """Run this Python interpreter with arguments. Returns its standard output and peak memory in MB.

    environment : its variables; by default those of this process
    Standard error is shown. Raises RunFailed if the process ends with status 1 or 2. SIGINT, SIGTERM and SIGHUP are
    passed on, and the process may still save its work; then this raises ClickException.
    """
    caught: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        caught.append(number)
        process.send_signal(number)

    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        # a group of its own: Ctrl-C in a terminal reaches it through this process only, once
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, cwd=ROOT, env=environment, process_group=0)
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if caught:
        stopped = click.ClickException(f"Stopped by {signal.Signals(caught[0]).name}.")
        stopped.exit_code = 128 + caught[0]
        raise stopped
    if process.returncode:
        failure = RunFailed if process.returncode in (1, 2) else click.ClickException
        raise failure(f"`{' '.join(arguments)}` ended with status {process.returncode}.")
    return text, usage.ru_maxrss * 1024e-6
