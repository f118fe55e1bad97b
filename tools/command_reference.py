"""Write docs/commands.md: every command with its help, as `flashlm-numba COMMAND --help` prints it.

\b
    python tools/command_reference.py            write the page
    python tools/command_reference.py --check    end with status 1 if the page is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.cli import main as commands

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
WIDTH = 100


def reference() -> str:
    """The page's text."""
    lines = [
        "# The commands",
        "",
        "What `--help` says of each, written by `python tools/command_reference.py`. The settings that `train --set` "
        "changes are in",
        "[training.md](training.md).",
    ]
    for name, command in [("", commands), *sorted(commands.commands.items())]:
        words = f"flashlm-numba {name}".strip()
        settings = {**commands.context_settings, "max_content_width": WIDTH}  # a command has its group's
        context = click.Context(command, info_name=words, terminal_width=WIDTH, **settings)
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        lines += ["", f"## {words}", "", "```", text, "```"]
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
