"""Calls of a compiled function by its address, so that Numba compiles and optimises it once.

Numba optimises a helper anew in every function that calls it, and the body of a prange loop three times more: alone,
in its wrapper and in the kernel. For the trunk that was half of all compilation. A function with much code is
therefore a serial kernel of its own. Its callers get the address as an argument, since an address must never become a
constant of cached code. Such a call costs about as much as one of C with all arrays' fields as arguments: use it for
a tile, not for a row.
"""

from __future__ import annotations

import inspect
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic


def address(function: Any, *examples: Any) -> Any:
    """The address of a serial kernel for arguments of the types of these examples, for `call`.

    A kernel that ends with *fields takes one tuple in their place, in `call` too. If Numba is switched off, this is the
    function itself.
    """
    if numba.config.DISABLE_JIT:
        starred = function.__code__.co_flags & inspect.CO_VARARGS
        return (lambda *arguments: function(*arguments[:-1], *arguments[-1])) if starred else function
    key = function, tuple(_kind(example) for example in examples)
    if key not in _addresses:
        signature = tuple(numba.typeof(example) for example in examples)
        function.compile(signature)  # loads it from the cache
        compiled = function.overloads[signature]
        _addresses[key] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return _addresses[key]


_addresses: dict[Any, int] = {}  # of the functions, which live as long as the process


def _kind(example: Any) -> Any:
    """What determines Numba's type of an example, which takes Numba ten times as long to find."""
    if isinstance(example, np.ndarray):
        flags = example.flags
        return example.dtype, example.ndim, flags.c_contiguous, flags.f_contiguous, flags.writeable, flags.aligned
    if isinstance(example, tuple):
        return type(example), *map(_kind, example)
    return type(example)


if numba.config.DISABLE_JIT:

    def call(function, *arguments):
        function(*arguments)

else:

    @intrinsic
    def call(typingctx, function, *arguments):
        """Call the function at an address from `address`. Unchecked: the types must be those of its examples."""
        kinds = tuple(types.unliteral(kind) for kind in arguments)

        def codegen(context, builder, signature, values):
            number, packed = values
            given = [builder.extract_value(packed, i) for i in range(len(kinds))]
            pointer = context.call_conv.get_function_type(types.none, kinds).as_pointer()
            context.call_conv.call_function(builder, builder.inttoptr(number, pointer), types.none, kinds, given)
            return context.get_dummy_value()

        return types.void(types.intp, types.StarArgTuple.from_types(kinds)), codegen
