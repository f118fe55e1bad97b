"""The machine's description and speed, the commit, and JSON."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest

from flashlm_numba.system.display import peak_rss_mb
from tools.bench import machine, output


def test_a_commit_is_named_in_a_clone_and_nowhere_else(tmp_path, monkeypatch):
    found = machine.commit()
    assert found is None or re.fullmatch("[0-9a-f]{12}[+]?", found)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None
    (tmp_path / "a.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = machine.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "a.py").write_text("2")
    assert machine.commit() == clean + "+"


def test_gemm_rate_and_environment_describe_the_machine(tmp_path):
    result = machine.gemm_rate(1, rows=16, dim=8, vocab_size=100, repeats=1)
    assert result["best"] >= result["2048 cubed"]["median"] > 1
    described = machine.environment(1)
    assert described["cpu"]
    assert described["blas"]
    assert described["cores"] >= 1
    assert peak_rss_mb() is None or peak_rss_mb() > 20
    output.write_json(tmp_path / "out.json", {"gemm": result, **described})
    assert json.loads((tmp_path / "out.json").read_text())["gemm"] == result
    with pytest.raises(ValueError, match="not JSON compliant"):
        output.write_json(tmp_path / "out.json", {"x": math.nan})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the kernel's count is taken as it is")
def test_peak_memory_is_not_that_of_the_process_that_started_it():
    code = (
        "import subprocess, sys; block = b'x' * 500_000_000\n"
        "code = 'from flashlm_numba.system.display import peak_rss_mb; print(peak_rss_mb())'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert 5 < float(run.stdout) < 300
