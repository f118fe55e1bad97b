"""The heads that tools/bench_head.py compares, by name.

A candidate is one head on one batch (head_problem.py). The benchmark times its `run`. Before that it checks the same
call: loss and all gradients, of all positions and all rows, against float64 (head_check.py).
To add a head, add a line here and a function that makes its Candidate (our_heads.py, baseline_heads.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from flashlm_numba.heads.tree_shapes import SHAPES
from tools.bench.baseline_heads import torch_adaptive_candidate, torch_dense_candidate, torch_tree_candidate
from tools.bench.head_problem import Candidate, Problem
from tools.bench.our_heads import dense_candidate, sampled_candidate, tree_candidate

CANDIDATES: dict[str, Callable[[Problem], Candidate]] = {
    "dense": dense_candidate,
    "sampled": sampled_candidate,
    **{f"tree:{shape}": functools.partial(tree_candidate, shape=shape) for shape in SHAPES if shape != "default"},
    "tree:default": functools.partial(tree_candidate, shape="default"),
    "torch:tree": torch_tree_candidate,  # beside tree:default: they share the tree and the reference
    "torch:tree-1thread": functools.partial(torch_tree_candidate, threads=1),
    "torch:eager": torch_dense_candidate,
    "torch:compile": functools.partial(torch_dense_candidate, compiled=True),
    "torch:adaptive": functools.partial(torch_adaptive_candidate, div_value=1.0),
    "torch:adaptive-div4": functools.partial(torch_adaptive_candidate, div_value=4.0),
}
QUICK = ("dense", "tree:two-level", "tree:default", "torch:eager", "torch:adaptive", "torch:adaptive-div4")
