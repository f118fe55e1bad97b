"""What _jit.py says of arguments, over the kernels' syntax trees."""

import ast
from pathlib import Path

import pytest

from flashlm_numba.kernels import _jit

SOURCES = sorted(Path(_jit.__file__).resolve().parent.glob("*.py"))
MOST_ARGUMENTS = 12


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]


def arguments(function):
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls", "typingctx")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_function_takes_more_than_twelve_arguments(path):
    for function in functions(ast.parse(path.read_text())):
        assert len(arguments(function)) <= MOST_ARGUMENTS, (getattr(function, "name", "lambda"), arguments(function))


def is_parallel(function):
    """Whether a decorator is @kernel, or a call with parallel=True."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Name) and decorator.id == "kernel":
            return True
        if isinstance(decorator, ast.Call) and any(keyword.arg == "parallel" for keyword in decorator.keywords):
            return True
    return False


def reads_a_field(node, bound):
    """Whether an expression is an attribute of something, or an element or view of such, or a name bound to one."""
    while isinstance(node, ast.Subscript | ast.Call):
        node = node.value if isinstance(node, ast.Subscript) else node.func
    if isinstance(node, ast.Attribute):
        return not (isinstance(node.value, ast.Name) and node.value.id == "np")
    return isinstance(node, ast.Name) and node.id in bound


def stores_through_fields(function):
    """Lines of a function that store into an array that came out of a field."""
    bound, lines = set(), []
    assignments = [n for n in ast.walk(function) if isinstance(n, ast.Assign | ast.AugAssign | ast.AnnAssign)]
    for _ in range(2):  # a name may be bound after the loop that uses it
        for node in assignments:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for to, value in pairs:
                    if isinstance(to, ast.Name) and value is not None and reads_a_field(value, bound):
                        bound.add(to.id)
    for node in assignments:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        single = [t for to in targets for t in (to.elts if isinstance(to, ast.Tuple) else [to])]
        for target in single:
            if isinstance(target, ast.Subscript) and reads_a_field(target.value, bound):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_parallel_function_stores_through_a_field(path):
    for function in functions(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and is_parallel(function):
            assert not stores_through_fields(function), (function.name, stores_through_fields(function))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("a.x[i] = 0", True),
        ("a.x[i, 0:2] += b.y[i]", True),
        ("x = a.x[0]\n    x[i] = 1", True),
        ("x, y = a.x, b\n    y[i], x[i] = 1, 2", True),
        ("flat = a.x.reshape(-1)\n    flat[i] = 1", True),
        ("b[i] = a.x[i]", False),
        ("f(a.x[i], b)", False),
        ("b[np.int64(i)] = 1", False),
    ],
)
def test_the_search_finds_such_stores(body, found):
    function = ast.parse(f"@kernel\ndef f(a, b, i):\n    {body}\n").body[0]
    assert is_parallel(function)
    assert bool(stores_through_fields(function)) is found


def is_prange(node):
    return (
        isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and getattr(node.iter.func, "id", "") == "prange"
    )


def prange_neighbours(tree):
    """Lines of prange loops that share a block with another one: Numba may fuse the two, without a barrier."""
    lines = []
    for node in ast.walk(tree):
        for block in (getattr(node, name, []) for name in ("body", "orelse", "finalbody")):
            loops = [inner.lineno for inner in block if is_prange(inner)] if isinstance(block, list) else []
            lines += loops[1:]
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_prange_loops_follow_one_another(path):
    assert not prange_neighbours(ast.parse(path.read_text()))


def test_the_search_finds_such_neighbours():
    text = "def f(n):\n    for i in prange(n):\n        g(i)\n    h(n)\n    for i in prange(n):\n        g(i)\n"
    assert prange_neighbours(ast.parse(text)) == [5]
    assert not prange_neighbours(ast.parse(text[: text.index("    h(n)")]))


def test_factories_helpers_have_names_of_their_own():
    """Compiled functions are known by their names, across the files of the cache too."""
    from flashlm_numba.kernels import conv_mixer

    names = [getattr(conv_mixer, n).py_func.__qualname__ for n in ("_decode", "_fill_states")]
    assert all(name.endswith("_conv") for name in names)
