"""What README.md and docs/ say can be run, and what they link to is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from flashlm_numba.cli import main as cli
from flashlm_numba.heads import HEADS, tree_shapes
from flashlm_numba.model.mixers import MIXERS
from flashlm_numba.model.recipes import from_recipe
from tools import command_reference
from tools.bench.train_jobs import expand

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def example_page(page):
    return pytest.param(page, marks=pytest.mark.slow) if page.name == "extending.md" else page  # compiles a trunk


@pytest.mark.parametrize("page", [example_page(p) for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_examples_run(page, capsys, monkeypatch):
    # examples add to both
    monkeypatch.setattr(tree_shapes, "SHAPES", dict(tree_shapes.SHAPES))
    monkeypatch.setitem(HEADS, "unigram", "")  # what an example puts there goes at the end
    monkeypatch.setitem(MIXERS, "shift", MIXERS["conv"])
    names = {}  # a page's blocks follow one another
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page):
    """Every `flashlm-numba ...` line names an existing command with existing options and values in range."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line.split(" #")[0]):
                words = shlex.split(part)
                if not words or not words[0].endswith("flashlm-numba") or len(words) == 1:
                    continue
                command = cli.main.commands.get(words[1])
                assert command is not None, line
                if "--help" not in words:  # raises for an option that is not there
                    context = command.make_context(words[1], words[2:], resilient_parsing=False)  # converts values too
                    context.close()


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "experiments.md"], ids=lambda p: p.name)
def test_commands_of_the_tools_have_these_options(page):
    """Of every `python tools/...`, wherever it stands; experiments.md keeps the commands of their day."""
    for script, words in re.findall(r"python tools/(\w+)\.py([^`\n#]*)", page.read_text(encoding="utf-8")):
        main = importlib.import_module(f"tools.{script}").main
        known = {
            option for parameter in getattr(main, "params", ()) for option in parameter.opts + parameter.secondary_opts
        }
        asked = {word for word in shlex.split(words) if word.startswith("--")}
        assert asked <= known, (script, asked - known)
        for settings in expand(re.findall(r"--set (\S+)", words)):  # raises for one that is not there
            from_recipe("default", settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_command_reference_is_what_the_commands_say():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page.split() == command_reference.reference().split()  # click may break lines elsewhere
    for name in cli.main.commands:
        assert f"## flashlm-numba {name}\n" in page


def test_readme_opens_with_the_two_commands():
    first, second = blocks(ROOT / "README.md", "sh")[:2]
    assert len(first.strip().splitlines()) == 1
    assert "flashlm-numba train" in first
    assert len(second.strip().splitlines()) == 1
    assert second.strip().endswith("pytest")
