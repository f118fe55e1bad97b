"""Write docs/commands.md, which shows the output of `flashlm-numba COMMAND --help` for every command.

\b
    python tools/command_reference.py            write the page
    python tools/command_reference.py --check    end with status 1 if the page is not what would be written
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.cli.main import main as group

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
WIDTH = 100


def help_of(name: str) -> str:
    """The help text from a separate process, because click may have cached other help settings in this process."""
    words = [sys.executable, "-m", "flashlm_numba", *name.split(), "--help"]
    environment = {**os.environ, "COLUMNS": str(WIDTH)}
    done = subprocess.run(words, cwd=PAGE.parents[1], env=environment, capture_output=True, text=True, check=True)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def reference() -> str:
    """The text of the page."""
    lines = [
        "# The commands",
        "",
        "What `--help` says of each, written by `python tools/command_reference.py`. The settings that `train --set` "
        "changes are in",
        "[training.md](training.md).",
    ]
    for name in ("", *sorted(group.commands)):
        words = f"flashlm-numba {name}".strip()
        lines += ["", f"## {words}", "", "```", help_of(name), "```"]
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Compare, do not write.")
def main(check: bool) -> None:
    """See the module's docstring."""
    if not check:
        PAGE.write_text(reference(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != reference():
        raise click.ClickException(f"{PAGE.name} is not what the commands say; run python tools/command_reference.py")


if __name__ == "__main__":
    main()
