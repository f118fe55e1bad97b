"""`flashlm-numba doctor`: what it says where all is well, and that it notices what is not."""

import importlib
import json

import numpy as np
import pytest
from helpers import command

from flashlm_numba.cli import doctor, self_checks
from flashlm_numba.kernels import _ternary_dots, ternary_gemv


@pytest.fixture
def quick(monkeypatch):
    """Without the measurements, which take a second."""
    monkeypatch.setattr(doctor, "gemm_gflops", lambda: 1.0)
    monkeypatch.setattr(doctor, "read_gbytes_per_s", lambda threads: 1.0)
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    ternary_gemv.best_variant()  # chosen before a test spoils the check


def test_a_good_machine_gets_a_good_verdict():
    done = command("doctor")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("All is well")
    for name in self_checks.CHECKS:
        assert f"{name}: error" in done.stdout


def test_json_holds_what_the_lines_say(quick):
    done = command("doctor", "--json", "--threads", 1)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["threads"] == 1
    assert found["problems"] == []
    assert all(error < self_checks.TOLERANCE / 3 for error in found["checks"].values())  # it could tell a worse kernel
    assert found["ternary_products"] in _ternary_dots.available()


def test_measurements_are_of_this_size():
    assert 0.1 < doctor.gemm_gflops() < 1e6
    assert 0.1 < doctor.read_gbytes_per_s(1) < 1e5


def test_a_wrong_kernel_is_a_problem(quick, monkeypatch):
    monkeypatch.setattr(ternary_gemv, "_agrees_with_plain", lambda variant: False)
    done = command("doctor")
    assert done.exit_code == 1
    assert "The self-check of the ternary products failed: its relative error is 1" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Something is wrong")


def test_a_wrong_head_is_a_problem(quick, monkeypatch):
    from flashlm_numba.heads.dense import DenseHead

    right = DenseHead.forward_backward

    def wrong(self, h, *arguments, **options):
        loss, nll, dh = right(self, h, *arguments, **options)
        return loss, nll, dh * np.float32(1.001)

    monkeypatch.setattr(DenseHead, "forward_backward", wrong)
    found = doctor.examine(1)
    assert any("dense head" in sentence for sentence in found["problems"])

    def not_a_number(self, h, *arguments, **options):
        loss, nll, dh = right(self, h, *arguments, **options)
        dh[0, 0] = np.nan
        return loss, nll, dh

    monkeypatch.setattr(DenseHead, "forward_backward", not_a_number)
    done = command("doctor", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["checks"]["dense head"] is None


def test_a_forced_variant_that_there_is_not_is_a_problem(quick, monkeypatch):
    monkeypatch.setenv("FLASHLM_NUMBA_TERNARY", "sse9")
    ternary_gemv.best_variant.cache_clear()
    done = command("doctor")
    ternary_gemv.best_variant.cache_clear()
    assert done.exit_code == 1
    assert "FLASHLM_NUMBA_TERNARY must be one of" in done.stdout


@pytest.mark.parametrize(
    ("where", "name", "check"),
    [
        ("flashlm_numba.kernels.ternary_wgrad", "ternary_wgrad", "int8 gradients"),
        ("flashlm_numba.model.trunks", "trunk_backward", "trunk's gradients"),
    ],
)
def test_a_wrong_gradient_is_a_problem(quick, monkeypatch, where, name, check):
    module = importlib.import_module(where)
    right = getattr(module, name)

    def wrong(*arguments):
        found = right(*arguments)
        target = getattr(found, "norm1", found)  # one of the trunk's gradients, or the only one
        target *= np.float32(1.001)
        return found

    monkeypatch.setattr(module, name, wrong)
    found = doctor.examine(1)
    assert f"The self-check of the {check} failed" in found["problems"][0]
    assert len(found["problems"]) == 1


def test_a_check_that_breaks_does_not_stop_the_others(quick, monkeypatch):
    def broken():
        raise ValueError("no such instruction")

    monkeypatch.setitem(self_checks.CHECKS, "trunk", broken)
    found = doctor.examine(1)
    assert found["checks"]["trunk"] is None
    assert found["checks"]["tree head"] is not None
    assert "no such instruction" in found["problems"][0]
    assert "trunk: failed" in doctor.report(found)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("OPENBLAS_CORETYPE", "OPENBLAS_CORETYPE is set to Haswell")],
)
def test_an_environment_that_costs_speed_is_noted(quick, monkeypatch, name, sentence):
    monkeypatch.setenv(name, "Haswell")
    found = doctor.examine(1)
    assert any(sentence in note for note in found["notes"])
    assert found["problems"] == []


def test_a_full_disk_is_noted(quick, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage(1, 1, 10**6))
    assert any("GB are free" in note for note in doctor.examine(1)["notes"])
