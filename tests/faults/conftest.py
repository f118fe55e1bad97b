"""A run that nothing happens to, which the others are compared with; small disks; the totals at the end."""

import os
import shutil
import subprocess

import pytest
from programs import INJECTED, begin, train_command


def pytest_terminal_summary(terminalreporter):
    """How many faults there were, and how many tests found something lost or a traceback."""
    if INJECTED:
        lost = [
            r
            for kind in ("failed", "error")
            for r in terminalreporter.stats.get(kind, [])
            if "tests/faults/" in r.nodeid
        ]
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(INJECTED.items()))
        terminalreporter.write_line(
            f"faults injected: {INJECTED.total():,} ({kinds}); tests that lost something: {len(lost)}"
        )


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
    """Folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    process = begin(train_command(corpus, folder))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return folder


def _mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """disk(kilobytes) makes a file system of this size, or gives the one that it made another size; its folder."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def make(kilobytes, *options):
        nonlocal mounted
        how = ",".join(["remount"] * mounted + [f"size={kilobytes}k", *options])
        may = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") is not None
        if not (may and _mount("-t", "tmpfs", "-o", how, "tmpfs", place)):
            assert "CI" not in os.environ, "CI is root and may mount"
            pytest.skip("a small disk needs root and `mount`; CI has both")
        mounted = True
        return place

    yield make
    if mounted:
        subprocess.run(["umount", place], check=True)
