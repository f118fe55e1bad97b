"""A layer calls only downwards: every import, inside functions and under TYPE_CHECKING too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "flashlm_numba"
# a module may import from layers with a smaller number, and from its own; kernels know nothing of the rest
LAYERS = {
    "kernels": 0,
    "system": 1,
    "data": 2,
    "heads": 2,
    "memory": 3,
    "model": 4,
    "inference": 5,
    "training": 6,
    "serving": 6,
    "api": 7,
    "cli": 8,
    "__main__": 9,
}


def modules():
    found = {}
    # the kernels by themselves: rglob does not follow their link
    paths = {*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")}
    for path in sorted(paths):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "__init__"] = path
    return found


MODULES = modules()


def imports(name):
    """Modules of the package that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            if not target.startswith("flashlm_numba."):
                continue
            target = target.removeprefix("flashlm_numba.")
            while target not in MODULES and "." in target:
                target = target.rpartition(".")[0]
            if target in MODULES:
                found.add(target)
    return found


def layer(name):
    return LAYERS[name.partition(".")[0]]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_point_down(name):
    for target in imports(name):
        assert layer(target) <= layer(name), f"{name} imports {target}"
    if name.startswith("data"):
        assert not any(target.startswith("heads") for target in imports(name)), "data knows no model"
    if name.startswith("heads"):
        assert not any(target.startswith("data") for target in imports(name)), "heads know no data"


def test_system_asks_the_kernels_for_their_cache_and_threads_only():
    found = {target for name in MODULES if name.startswith("system") for target in imports(name)}
    assert {target for target in found if target.startswith("kernels")} <= {
        "kernels",
        "kernels._jit",
        "kernels._blas",
        "kernels._cache",
    }


def test_no_circle():
    """Not even one that an import inside a function hides."""
    state = {}

    def visit(name, above):
        assert state.get(name) != "open", " -> ".join([*above, name])
        if state.get(name) == "done":
            return
        state[name] = "open"
        for target in sorted(imports(name)):
            if target != name:
                visit(target, [*above, name])
        state[name] = "done"

    for name in MODULES:
        visit(name, [])


def test_the_walk_sees_imports_inside_functions_and_of_submodules():
    assert "training.kernel_tasks" in MODULES
    assert "model.model" in imports("training.kernel_tasks")  # inside a function
    assert "kernels.conv_mixer" in imports("model.mixers")
