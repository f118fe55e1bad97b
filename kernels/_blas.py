"""Matrix products inside parallel regions: every thread calls SciPy's single-threaded sgemm.

One thread pool does all the work. Alternating between BLAS threads and Numba threads halves the speed of both, because
the idle workers of one pool spin while the other computes. SciPy's OpenBLAS, which is not the library of NumPy, is
therefore pinned to one thread. The threads of a Numba region call it in parallel, each on different rows.

The address of sgemm differs between processes, but compiled kernels are cached. The address is therefore an argument,
`blas`, and never a constant of the compiled code.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashlm_numba.kernels._jit import helper


@functools.cache
def _scipys_blas() -> Any:
    """SciPy's module of BLAS functions. Imported by its name, it brings all of scipy.linalg, which takes 0.2 s."""
    import scipy

    name, suffixes = "scipy.linalg.cython_blas", tuple(importlib.machinery.EXTENSION_SUFFIXES)
    with contextlib.suppress(ImportError):
        for file in Path(scipy.__file__).parent.joinpath("linalg").glob("cython_blas.*"):
            spec = importlib.util.spec_from_file_location(name, file) if file.name.endswith(suffixes) else None
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    return importlib.import_module(name)


def pin_to_one_thread() -> None:
    """Pin SciPy's BLAS to one thread. NumPy's BLAS keeps its number of threads if it is a different library."""
    from threadpoolctl import ThreadpoolController

    _scipys_blas()  # loads the library

    package = Path(np.__file__).resolve().parent
    numpys = (str(package) + os.sep, str(package.parent / "numpy.libs") + os.sep)  # macOS; Linux and Windows
    blas = [lib for lib in ThreadpoolController().lib_controllers if lib.user_api == "blas"]
    scipys = [lib for lib in blas if not str(Path(lib.filepath).resolve()).startswith(numpys)]
    for library in scipys or blas:  # if NumPy and SciPy share one BLAS, pin that one
        library.set_num_threads(1)


@functools.cache
def sgemm_address() -> int:
    """Address of SciPy's sgemm, for the `blas` argument of kernels. The first call pins SciPy's BLAS to one thread."""
    pin_to_one_thread()
    if numba.config.DISABLE_JIT:
        return 0
    capsule, python = _scipys_blas().__pyx_capi__["sgemm"], ctypes.pythonapi
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", python))
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", python))
    return pointer_of(capsule, name_of(capsule))


class Matrix(NamedTuple):
    """A column-major matrix, as Fortran expects it."""

    start: np.int64  # address
    leading: int  # distance between columns, in elements


@intrinsic
def _call_sgemm(typingctx, address, trans_a, trans_b, shape, a, b, beta, c):
    """Fortran's sgemm with alpha = 1: c = op(a) @ op(b) + beta * c, for shape (m, n, k); a, b, c: Matrix."""
    whole, matrix = types.intp, types.NamedUniTuple(types.intp, 2, Matrix)
    shape_type = types.UniTuple(types.intp, 3)
    signature = types.void(whole, whole, whole, shape_type, matrix, matrix, types.float32, matrix)
    byte_pointer = ir.IntType(8).as_pointer()

    def codegen(context, builder, sig, args):
        def slot(value):  # Fortran takes all arguments by reference
            return builder.bitcast(cgutils.alloca_once_value(builder, value), byte_pointer)

        def int32(value):
            return slot(builder.trunc(value, ir.IntType(32)))

        def letter(value):
            return slot(builder.trunc(value, ir.IntType(8)))

        def pointer(value):
            return builder.inttoptr(value, byte_pointer)

        address, trans_a, trans_b, shape, a, b, beta, c = args
        m, n, k = cgutils.unpack_tuple(builder, shape, 3)
        (a, lda), (b, ldb), (c, ldc) = (cgutils.unpack_tuple(builder, matrix, 2) for matrix in (a, b, c))
        function_type = ir.FunctionType(ir.VoidType(), [byte_pointer] * 13)
        sgemm = builder.inttoptr(address, function_type.as_pointer())
        one = ir.Constant(ir.FloatType(), 1.0)
        builder.call(
            sgemm,
            [
                letter(trans_a),
                letter(trans_b),
                int32(m),
                int32(n),
                int32(k),
                slot(one),
                pointer(a),
                int32(lda),
                pointer(b),
                int32(ldb),
                slot(beta),
                pointer(c),
                int32(ldc),
            ],
        )
        return context.get_dummy_value()

    return signature, codegen


if numba.config.DISABLE_JIT:  # an intrinsic has no Python form, so use plain twins

    def _plain(out, product, beta):
        out[...] = product if beta == 0 else out * np.float32(beta) + product

    def gemm_nn(blas, out, a, b, beta):
        _plain(out, a @ b, beta)

    def gemm_nt(blas, out, a, b, beta):
        _plain(out, a @ b.T, beta)

    def gemm_tn(blas, out, a, b, beta):
        _plain(out, a.T @ b, beta)

else:
    _N, _T = ord("N"), ord("T")

    @helper
    def _matrix(x):
        """The row-major matrix x (rows, columns) as a column-major Matrix, which is its transpose."""
        return Matrix(np.int64(x.ctypes.data), max(x.strides[0] // 4, x.shape[1]))

    @helper
    def _scale(out, beta):
        for i in range(out.shape[0]):
            for j in range(out.shape[1]):
                out[i, j] = out[i, j] * beta if beta != 0 else np.float32(0)

    @helper
    def gemm_nn(blas, out, a, b, beta):
        """out (M, N) = a (M, K) @ b (K, N) + beta * out, float32. The last axes must be contiguous (unchecked)."""
        m, n, k = out.shape[0], out.shape[1], a.shape[1]
        if m == 0 or n == 0:
            return
        if k == 0:
            _scale(out, np.float32(beta))
            return
        # row-major out = a b is column-major out' = b' a'
        _call_sgemm(blas, _N, _N, (n, m, k), _matrix(b), _matrix(a), np.float32(beta), _matrix(out))

    @helper
    def gemm_nt(blas, out, a, b, beta):
        """out (M, N) = a (M, K) @ b (N, K).T + beta * out."""
        m, n, k = out.shape[0], out.shape[1], a.shape[1]
        if m == 0 or n == 0:
            return
        if k == 0:
            _scale(out, np.float32(beta))
            return
        _call_sgemm(blas, _T, _N, (n, m, k), _matrix(b), _matrix(a), np.float32(beta), _matrix(out))

    @helper
    def gemm_tn(blas, out, a, b, beta):
        """out (M, N) = a (K, M).T @ b (K, N) + beta * out."""
        m, n, k = out.shape[0], out.shape[1], a.shape[0]
        if m == 0 or n == 0:
            return
        if k == 0:
            _scale(out, np.float32(beta))
            return
        _call_sgemm(blas, _N, _T, (n, m, k), _matrix(b), _matrix(a), np.float32(beta), _matrix(out))
