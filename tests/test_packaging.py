"""What gets installed."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_kernels_are_one_folder_under_two_names():
    link = ROOT / "flashlm_numba" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"


def test_the_kernels_table_of_contents_is_complete():
    from flashlm_numba import kernels

    names = {path.stem for path in ROOT.glob("kernels/*.py")} - {"__init__"}
    assert names <= set(re.findall(r"\w+", kernels.__doc__))
    assert set(kernels.__all__) == {name for name in names if not name.startswith("_")}
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}.py`" not in page and not name.startswith(("reference", "_check"))] == []


def test_settings_and_the_kernels_package_load_without_numba():
    code = "import sys, flashlm_numba.model.config, flashlm_numba.kernels; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_of_the_package_imports_the_top_level_kernels():
    for path in [*ROOT.glob("flashlm_numba/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("tools/**/*.py")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(("import kernels", "from kernels")), f"{path.name}: {line}"


def test_only_the_kernels_use_numba_decorators():
    for path in ROOT.glob("flashlm_numba/*.py"):
        assert "njit" not in path.read_text(encoding="utf-8"), path.name


@pytest.mark.skipif("CI" not in __import__("os").environ, reason="builds wheels; CI does")
@pytest.mark.parametrize("link", [pytest.param("link", marks=pytest.mark.slow), "text file"])
def test_the_wheel_holds_the_kernels_whatever_became_of_the_link(tmp_path, link):
    """A checkout on Windows and a zip download have a text file where the link to the kernels was."""
    source = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    if link == "text file":
        (source / "flashlm_numba" / "kernels").unlink()
        (source / "flashlm_numba" / "kernels").write_text("../kernels", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"flashlm_numba"}
    assert "flashlm_numba/kernels/trunk.py" in names
    assert "flashlm_numba/kernels" not in names
    assert "flashlm_numba/py.typed" in names
    page = {f"flashlm_numba/serving/page/{path.name}" for path in (ROOT / "flashlm_numba/serving/page").iterdir()}
    assert len(page) == 4
    assert page <= set(names)


def test_the_oldest_dependencies_of_ci_are_those_that_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    allowed = dict(
        re.fullmatch(r"([\w-]+)>=([\d.]+)", text).groups() for text in project["dependencies"] if ">=" in text
    )
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").split()
    oldest = dict(line.split("==") for line in lines)

    def number(version):
        return [int(part) for part in version.split(".")] + [0] * (3 - version.count(".") - 1)

    assert {name: number(v) for name, v in oldest.items()} == {name: number(v) for name, v in allowed.items()}
