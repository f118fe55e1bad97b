"""Every option of every command, given what it cannot be: exit status 2, a sentence that names it, no traceback."""

import click
import pytest
from helpers import command
from programs import INJECTED

from flashlm_numba.cli.main import main


def cases():
    for name, subcommand in main.commands.items():
        for parameter in subcommand.params:
            if not isinstance(parameter, click.Option) or parameter.is_flag:
                continue
            option, kind = parameter.opts[-1], parameter.type
            values = []
            if isinstance(kind, click.Choice):
                values = ["", "nonsense", "TREE "]
            elif isinstance(kind, click.IntRange):
                values = ["", "x", "1.5", str((kind.min or 0) - 1)] + (
                    [str(kind.max + 1)] if kind.max is not None else []
                )
            elif isinstance(kind, click.FloatRange):
                values = ["", "x", "nan", "inf", "-1", str(kind.max + 1) if kind.max is not None else "-inf"]
            for value in values:
                yield name, option, value


@pytest.mark.parametrize(("name", "option", "value"), list(cases()))
def test_a_value_out_of_range(name, option, value):
    INJECTED["options out of range"] += 1
    arguments = [name] + ["somewhere"] * sum(
        isinstance(p, click.Argument) and p.required for p in main.commands[name].params
    )
    done = command(*arguments, f"{option}={value}")
    assert done.exit_code == 2, done.output
    assert option in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize("name", list(main.commands))
def test_an_option_that_there_is_not(name):
    INJECTED["options out of range"] += 1
    done = command(name, "--no-such-option")
    assert done.exit_code == 2
    assert "No such option" in done.stderr


def test_there_are_cases_of_every_kind():
    assert len(list(cases())) > 60
