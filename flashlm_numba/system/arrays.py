"""Arrays of callers in the form that compiled kernels take without being compiled again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np


class _Memory:
    """The memory of an array, without its protection. It keeps the array alive."""

    def __init__(self, array: np.ndarray) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}
        self.array = array


def for_reading(value: Any) -> Any:
    """The array for a kernel that only reads it: value itself, or a view of its memory, or a copy if unaligned.

    Numba compiles a function anew for arrays that are read-only, unaligned or of a class of their own (np.memmap), and
    arrays of pandas and JAX are read-only. The view is an ordinary array, which nothing may write to. Other objects
    that NumPy can read as an array are converted; what is no array is returned as it is.

    >>> x = np.ones(2)
    >>> for_reading(x) is x
    True
    >>> x.flags.writeable = False
    >>> view = for_reading(x)
    >>> view.flags.writeable, np.shares_memory(view, x)
    (True, True)
    """
    if type(value) is np.ndarray and value.flags.behaved:
        return value
    if isinstance(value, np.ma.MaskedArray) or not hasattr(value, "__array__"):
        return value
    array = np.asarray(value)
    if array.dtype.hasobject:
        return array
    if not array.flags.aligned:
        return array.copy(order="K")
    return array if array.flags.writeable else np.asarray(_Memory(array))


def hash_of_arrays(arrays: Mapping[str, Any]) -> str:
    """A hash of names, dtypes, shapes and values, 16 hexadecimal digits, whatever the order of the names.

    >>> hash_of_arrays({"a": np.zeros(2), "b": 1}) == hash_of_arrays({"b": 1, "a": np.zeros(2)})
    True
    >>> hash_of_arrays({"a": np.zeros(2)}) == hash_of_arrays({"a": np.zeros((1, 2))})
    False
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(arrays.items()):
        if value is not None:
            array = np.ascontiguousarray(value)
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.data if array.size else b"")
    return digest.hexdigest()
