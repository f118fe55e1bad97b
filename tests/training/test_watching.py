"""Charts of runs, and their values in TensorBoard."""

import json
import struct

import pytest
from helpers import TINY, command

import flashlm_numba as fl
from flashlm_numba.system.errors import UserError
from flashlm_numba.training import plots
from flashlm_numba.training.metrics import read_metrics

SETTINGS = [part for setting in TINY for part in ("--set", setting)]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Two runs, one of them watched, and the folder of its events."""
    folder = tmp_path_factory.mktemp("runs")
    events = folder / "events"
    for name, more in (("tree", ["--tensorboard", events]), ("dense", ["--head", "dense", "--set", "ema=0.5"])):
        done = command("train", corpus, "--out", folder / name, "--steps", 9, "--threads", 1, *SETTINGS, *more)
        assert done.exit_code == 0, done.output
    return folder, events


# --- charts ---


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
@pytest.mark.parametrize("x", list(plots.AXES))
def test_runs_are_drawn(runs, tmp_path, kind, x):
    folder, _ = runs
    out = tmp_path / f"chart.{kind}"
    done = command("plot", folder / "tree", folder / "dense", "--out", out, "--x", x)
    assert done.exit_code == 0, done.output
    data = out.read_bytes()
    assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])
    if kind == "png":
        width, height = struct.unpack(">II", data[16:24])
        assert width > 1000
        assert height > 700
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_chart_holds_the_values_of_the_log(runs):
    folder, _ = runs
    lines = [read_metrics(folder / name) for name in ("tree", "dense")]
    figure = plots._figure(["tree", "dense"], lines, "steps")
    loss, validation, speed, shares = figure.axes
    assert [line.get_label() for line in loss.lines if not line.get_label().startswith("_")] == ["tree", "dense"]
    assert loss.lines[0].get_xdata().tolist() == list(range(1, 10))
    assert loss.lines[0].get_ydata().tolist() == [line["nll"] for line in lines[0]]
    assert speed.lines[0].get_ydata().tolist() == [line["tokens_per_s"] for line in lines[0]]
    found = {line.get_label(): line.get_ydata() for line in validation.lines}
    assert list(found) == ["tree", "dense", "dense, EMA"]
    assert list(found["dense, EMA"]) == [line["val_nll_ema"] for line in lines[1] if "val_nll_ema" in line]
    assert validation.lines[0].get_xdata().tolist() == [4, 8, 9]
    widths = [patch.get_width() for patch in shares.patches]
    assert sum(widths) == pytest.approx(2)  # every bar is a whole


def test_one_line_and_a_torn_one_are_drawn(runs, tmp_path):
    folder, _ = runs
    short = tmp_path / "short"
    short.mkdir()
    first = (folder / "tree" / "metrics.jsonl").read_text().splitlines()[0]
    (short / "metrics.jsonl").write_text(first + '\n{"step": 2, "nl')
    assert len(fl.Run(short).metrics) == 1
    assert command("plot", short, "--out", tmp_path / "x.png").exit_code == 0


def test_what_cannot_be_drawn_is_told(runs, tmp_path, monkeypatch):
    folder, _ = runs
    (tmp_path / "metrics.jsonl").write_text("")
    cases = [
        ((folder / "tree", "--out", tmp_path / "x.gif"), r"must end in .png, .svg or .pdf"),
        ((folder / "none", "--out", tmp_path / "x.png"), "has no log that can be read"),
        ((tmp_path, "--out", tmp_path / "x.png"), "has no line yet"),
        ((folder / "tree", "--out", tmp_path / "none" / "x.png"), "cannot be written"),
    ]
    for arguments, message in cases:
        done = command("plot", *arguments)
        assert done.exit_code == 1, done.output
        assert message in done.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'flashlm-numba\[plot\]'"):
        plots.plot_runs([folder / "tree"], tmp_path / "x.png")


# --- TensorBoard ---


def events(folder):
    """The scalars in event files: (name, step) and value."""
    from tensorboardX.proto.event_pb2 import Event

    found, purged = {}, []
    for path in sorted(folder.glob("events.out.*"), key=lambda path: int(path.name.rpartition("-")[2])):
        data, at = path.read_bytes(), 0
        while at < len(data):  # records: length, its checksum, the event, its checksum
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == 1:  # START: later steps of earlier files do not count
                purged.append(event.step)
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found, purged


def test_every_step_is_in_tensorboard(runs):
    folder, written = runs
    found, _ = events(written / "tree")
    lines = read_metrics(folder / "tree")
    for line in lines:
        assert found["loss/nll", line["step"]] == pytest.approx(line["nll"])
        assert found["speed/tokens_per_s", line["step"]] == pytest.approx(line["tokens_per_s"])
        assert found["share_of_time/head", line["step"]] == pytest.approx(line["shares"]["head"])
    validated = {step: value for (name, step), value in found.items() if name == "loss/validation_nll"}
    assert validated == pytest.approx({line["step"]: line["val_nll"] for line in lines if "val_nll" in line})


def test_a_resumed_run_goes_on_there(corpus, tmp_path):
    out, written = tmp_path / "run", tmp_path / "events"
    first = ["train", corpus, "--out", out, "--steps", 8, "--threads", 1, *SETTINGS, "--tensorboard", written]
    assert command(*first).exit_code == 0
    again = command("train", "--resume", out, "--checkpoint", "step-4", "--steps", 10, "--tensorboard", written)
    assert again.exit_code == 0, again.output
    found, purged = events(written / "run")
    assert purged[-1] == 5
    lines = {line["step"]: line["nll"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}
    assert {step: value for (name, step), value in found.items() if name == "loss/nll"} == pytest.approx(lines)


def test_a_missing_package_is_told_before_anything_is_done(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = command("train", corpus, "--out", tmp_path / "run", "--steps", 2, "--tensorboard", tmp_path / "events")
    assert done.exit_code == 1
    assert "pip install 'flashlm-numba[tensorboard]'" in done.output
    assert not (tmp_path / "run").exists()
