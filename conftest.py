"""Hypothesis profiles: dev, ci (the same examples on every run), and nojit for `make test-nojit`."""

import importlib.util
import os

os.environ.setdefault("NUMBA_NUM_THREADS", str(os.cpu_count() or 1))
# OpenMP's threads wait by spinning, so that two processes on the same cores, as under `pytest -n 2`, take many times as
# long for each region. Asleep they only take longer to wake.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from hypothesis import HealthCheck, settings

collect_ignore = ["kernels"]  # its doctests run as flashlm_numba.kernels; as kernels every module would load twice
if importlib.util.find_spec("lm_eval") is None:  # of the extra `eval`
    collect_ignore.append("flashlm_numba/inference/harness.py")

settings.register_profile("dev", deadline=None, max_examples=20)
# first calls compile, so no deadline; the same examples on every run
settings.register_profile(
    "ci", deadline=None, max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nojit", deadline=None, max_examples=3, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the slow tests where CI is set, which has no time for them."""
    if "CI" in os.environ:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; run pytest without the variable CI"))
