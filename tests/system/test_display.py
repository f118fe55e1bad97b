"""What long commands show: a bar in a terminal, plain lines elsewhere."""

import pytest

from flashlm_numba.system import display
from flashlm_numba.system.display import Display

LINE = {
    "step": 2,
    "loss": 6.25,
    "nll": 6.125,
    "tokens_per_s": 12_345.6,
    "shares": {"embedding": 0.01, "trunk": 0.5, "head": 0.25, "optimizer": 0.2},
}


@pytest.mark.parametrize(("terminal", "columns"), [(True, "160"), (True, "80"), (False, "80")])
def test_step_shows_what_a_trainer_wants_to_know(monkeypatch, capsys, terminal, columns):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", columns)
    with Display() as shown, shown.steps(2, 0):
        shown.note("a note [with brackets]")
        shown.step(LINE, seconds_left=75)
    output = capsys.readouterr()
    assert output.out == ""
    assert "a note [with brackets]" in output.err
    for part in (
        "loss 6.250",
        "NLL 6.125",
        "12,346 tokens/s",
        "1m15s left",
        "head 25%",
        "trunk 50%",
        "optimizer 20%",
    ):
        assert part in output.err
    assert "2/2" in output.err


def test_the_loss_over_candidates_is_not_called_nll(capsys):
    with Display() as shown, shown.steps(2, 0):
        shown.step({**LINE, "sampled": True}, seconds_left=75)
    assert "NLL of the sample 6.125" in capsys.readouterr().err


def test_plain_lines_are_few(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with Display() as shown, shown.tokens("scoring", 1000):
        for _ in range(100):
            now[0] += 1.0
            shown.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 5
    assert lines[0].startswith("scoring 200/1,000")
