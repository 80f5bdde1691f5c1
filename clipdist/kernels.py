"""Exact products of int8 matrices on this machine, by torch where it is there. Needs only numpy to import."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clipdist.scores import Ints, widen

Tensor: TypeAlias = Any  # torch is not imported here, nor its types

LEAST = -(2**31)
"""The product of a row that must not be found."""

_FEW_QUERIES = 4  # whose products are compared one by one
_SEGMENT = 32  # products whose largest is compared first
_GPU_ROWS, _GPU_MULTIPLE = 32, 8  # cuBLAS multiplies int8 matrices of more than 16 rows, and in eights
_TRIED = (1, 3, 32, 200)  # numbers of queries that a kernel is tried with before it is believed


@dataclass(frozen=True)
class Kernel:
    """Products on one device. Integers below 2^31 are exact whatever their order, so every device finds the same."""

    device: str

    def place(self, code: NDArray[np.int8]) -> Tensor:
        """Codes [rows, dim] where `products` wants them: as they are on a CPU, on its own memory for a GPU."""
        import torch

        if self.device == "cpu":
            return torch.from_numpy(code)
        rows, dim = (-size % _GPU_MULTIPLE for size in code.shape)
        return torch.nn.functional.pad(torch.from_numpy(code).to(self.device), (0, dim, 0, rows))

    def buffer(self, size: int) -> Tensor:
        """Room for `size` products: memory that is not new each time saves a tenth of the time on a CPU."""
        import torch

        return torch.empty(size, dtype=torch.int32) if self.device == "cpu" else None

    def products(self, integers: NDArray[np.int8], placed: Tensor, buffer: Tensor = None) -> Tensor:
        """int32 [queries, rows], of queries int8 [queries, dim]; in `buffer`, where one is given."""
        import torch

        queries = torch.from_numpy(integers).to(self.device)
        if buffer is not None:
            out = buffer[: len(integers) * len(placed)].view(len(integers), len(placed))
            return torch._int_mm(queries, placed.t(), out=out)
        if self.device != "cpu":
            missing = max(_GPU_ROWS - len(integers), -len(integers) % _GPU_MULTIPLE)
            queries = torch.nn.functional.pad(queries, (0, placed.shape[1] - queries.shape[1], 0, missing))
        return torch._int_mm(queries, placed.t())[: len(integers)]

    def drop(self, products: Tensor, rows: NDArray[np.bool_]) -> None:
        """Gives `LEAST` to the rows that must not be found, and to padding behind the last one."""
        import torch

        products[:, len(rows) :] = LEAST
        if rows.any():
            products[:, : len(rows)].masked_fill_(torch.from_numpy(rows).to(products.device), LEAST)

    def best(self, products: Tensor, k: int) -> Ints:
        """Places [queries, k] of the largest products, in no order."""
        return np.asarray(products.topk(k, dim=1, sorted=False).indices.cpu().numpy())

    def at_least(self, products: Tensor, least: NDArray[np.int32]) -> tuple[Ints, Ints, NDArray[np.int32]]:
        """(query, place, product) of every product that reaches its query's `least`."""
        import torch

        if products.device.type == "cpu" and len(least) <= _FEW_QUERIES:
            values = products.numpy()
            query, place = np.divmod(np.flatnonzero(values >= least[:, None]), values.shape[1])
            return query, place, values[query, place]
        limits = torch.from_numpy(least).to(products.device)[:, None]
        whole = products.shape[1] // _SEGMENT * _SEGMENT
        segments = products[:, :whole].unflatten(1, (-1, _SEGMENT))
        query, segment = _where(segments.amax(2) >= limits)
        inside = segments[query, segment]
        hit, place = _where(inside >= limits[query])
        tail, tail_place = _where(products[:, whole:] >= limits)
        values = torch.cat([inside[hit, place], products[tail, whole + tail_place]])
        queries = torch.cat([query[hit], tail])
        places = torch.cat([segment[hit] * _SEGMENT + place, whole + tail_place])
        return queries.cpu().numpy(), places.cpu().numpy(), values.cpu().numpy()


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is true. On a CPU by numpy, which is several times faster than torch there."""
    import torch

    if mask.device.type != "cpu":
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    flat = np.flatnonzero(mask.numpy())
    found = np.divmod(flat, max(1, mask.shape[1]))
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


@functools.cache
def find_kernel(device: str = "cpu") -> Kernel | None:
    """The kernel of a device; None where there is no torch, or where its products are wrong (sums of 8-bit products
    saturate on some processors) or slower than float32."""
    try:
        import torch
    except ImportError:
        return None
    kernel = Kernel(device)
    try:
        exact = all(_is_exact(kernel, count) for count in _TRIED)
    except (RuntimeError, AttributeError):  # torch has no such product for this device
        return None
    return kernel if exact and (torch.device(device).type != "cpu" or _is_fast(kernel)) else None


def _is_exact(kernel: Kernel, queries: int) -> bool:
    random = np.random.default_rng(queries)
    code = random.integers(-127, 128, (1000, 520)).astype(np.int8)
    integers = random.integers(-127, 128, (queries, 520)).astype(np.int8)
    integers[0], code[:2] = 127, np.array([[127], [-127]])  # the largest sums there can be
    found = kernel.products(integers, kernel.place(code))[:, : len(code)].cpu().numpy()
    return bool((found == integers.astype(np.int64) @ code.T.astype(np.int64)).all())


def _is_fast(kernel: Kernel) -> bool:
    """Whether one query goes faster through codes than through float16 rows in float32, as `topk.top_k` does it."""
    code, rows = np.ones((16384, 512), np.int8), np.ones((16384, 512), np.float16)
    placed, wide = kernel.place(code), np.empty(rows.shape, np.float32)
    return _seconds(lambda: kernel.products(code[:1], placed)) < _seconds(lambda: widen(rows, wide) @ wide[0])


def _seconds(work: Callable[[], Any]) -> float:
    """The least of three times."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
