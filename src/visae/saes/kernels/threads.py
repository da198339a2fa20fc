"""Compiled functions over ranges of rows, on threads of our own.

Kernels are compiled by numba once, kept on disk, and release Python's lock; each works on a range
of rows, the first and the one after the last. Work is cut at places that depend on the data alone,
so that results do not depend on the number of threads. Numba's own thread pools are not used: they
outlive a fork badly, and wait beside torch's.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, no_type_check

import numba
import torch
from numba.extending import intrinsic

__all__ = ["Buffers", "compiled", "even_ranges", "larger", "over_ranges"]

Range = tuple[int, int]

compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = numba.njit(
    nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
)
"""Compile a function at its first call, with sums in any order; NaN and infinity are kept."""


@intrinsic
@no_type_check
def larger(_context, one, _other):
    """The larger of two whole numbers of one type; unlike ``max``, one vector instruction."""

    @no_type_check
    def generate(_target, builder, _signature, arguments):
        return builder.select(builder.icmp_signed(">", *arguments), *arguments)

    return one(one, one), generate


def over_ranges(kernel: Callable[[Range], Any], ranges: Iterable[Range]) -> list[Any]:
    """Call a function on every range, several at once; the results in the order of the ranges."""
    return list(_pool(torch.get_num_threads()).map(kernel, ranges))


def even_ranges(n_rows: int, step: int) -> list[Range]:
    """Ranges of ``step`` rows that cover all; the last may be shorter."""
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


@functools.lru_cache(maxsize=1)
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="visae-kernels")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


class Buffers:
    """Memory that is kept from step to step, for taking it anew costs more than filling it."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def take(
        self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """A tensor on the CPU that holds whatever the last user of the name left in it."""
        kept = self._tensors.get(name)
        if kept is None or kept.shape != tuple(shape) or kept.dtype != dtype:
            kept = self._tensors[name] = torch.empty(tuple(shape), dtype=dtype)
        return kept
