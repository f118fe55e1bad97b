"""Pieces of LLVM code that several intrinsics are built from, with llvmlite alone: no function here needs Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir


def declare(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """The function of this name and type, declared in the builder's module if it is not yet."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def allow_features(builder: Any, known: str, needed: str) -> None:
    """Let the function that the builder is in use more of the processor than the whole module may.

    known : the features of the module, separated by commas, which the function would otherwise lose
    LLVM copies the function into callers that have the same features, and calls it from others.
    """
    text = ",".join(filter(None, (known, needed)))
    # llvmlite's `add` allows single words only, but writes whatever the set contains
    set.add(builder.function.attributes, f'"target-features"="{text}"')


def build_loop(builder: Any, first: Any, last: Any, initial: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    """Build a loop over the int64 values first..last - 1, done at least once, that carries values of any types.

    body : body(index, values) builds one turn and returns the next values;  initial : the values of the first turn
    Returns the values after the last turn. The builder then stands behind the loop.
    """
    before, loop = builder.block, builder.append_basic_block("loop")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(first.type)
    values = [builder.phi(value.type) for value in initial]
    new = body(index, values)
    following, end = builder.add(index, ir.Constant(first.type, 1)), builder.block
    for phi, start, value in zip([index, *values], [first, *initial], [following, *new], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, end)
    after = builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed("<", following, last), loop, after)
    builder.position_at_end(after)
    return new


def build_chunked_loop(
    builder: Any, count: Any, size: int, initial: list[Any], body: Callable[..., list[Any]]
) -> list[Any]:
    """As build_loop, over chunks of `size` of the values 0..count - 1: body(first, last, values)."""

    def chunk(index, values):
        first = builder.mul(index, ir.Constant(index.type, size))
        limit = builder.add(first, ir.Constant(index.type, size))
        return body(first, builder.select(builder.icmp_signed("<", limit, count), limit, count), values)

    zero, most = ir.Constant(count.type, 0), ir.Constant(count.type, size - 1)
    chunks = builder.sdiv(builder.add(count, most), ir.Constant(count.type, size))
    return build_loop(builder, zero, chunks, initial, chunk)


def build_while(builder: Any, count: Any, initial: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    """As build_loop, over 0..count - 1, but without a turn if count is 0. Returns the values behind the last turn."""
    before = builder.block
    head, turn, after = (builder.append_basic_block(name) for name in ("head", "turn", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(count.type)
    values = [builder.phi(value.type) for value in initial]
    builder.cbranch(builder.icmp_signed("<", index, count), turn, after)
    builder.position_at_end(turn)
    new = body(index, values)
    following = builder.add(index, ir.Constant(index.type, 1))
    for phi, start, value in zip(
        [index, *values], [ir.Constant(count.type, 0), *initial], [following, *new], strict=True
    ):
        phi.add_incoming(start, before)
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return values
