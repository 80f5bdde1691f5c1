"""Exact top-k through codes: integers rule out nearly all rows, what is left gets its exact score.

The answer is that of `topk.top_k`, to the bit: a row is left out only when its score is proven to be below the k-th
best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipdist.codes import Codes, code_queries
from clipdist.kernels import Kernel
from clipdist.scores import Floats, Ints, PreparedQueries, Rows, exact_pair_scores, prepare_queries
from clipdist.shard_reader import RowGroup
from clipdist.topk import Best, Ids, Keep, Pool, TopK, candidates

_QUERIES_AT_ONCE = 256
_PRODUCTS_AT_ONCE = 1 << 22  # 16 MiB of int32: they stay in the cache until they are compared
_CROWDED = 8  # above one row in so many left, float32 rules out more than it costs


@dataclass(frozen=True)
class Part:
    """A row group with its codes, also where the kernel wants them, and its vectors by their places."""

    group: RowGroup
    codes: Codes
    placed: Any
    vectors: Callable[[Ints], Rows]

    def dropped(self, keep: Keep | None) -> NDArray[np.bool_]:
        """Which places must not be found: deleted rows, and those that `keep` leaves out."""
        mask = np.zeros(self.group.rows, bool)
        mask[self.group.deleted] = True
        if keep is not None:
            mask[~mask] = ~keep(self.group.first, self.group.first + self.group.live)
        return mask


class _Waiting(NamedTuple):
    """Pairs that may be among the best: what their scaled score is at most, and where their vectors are."""

    query: Ints
    most: Floats
    part: Ints
    place: Ints

    def take(self, index: NDArray[Any]) -> _Waiting:
        return _Waiting(self.query[index], self.most[index], self.part[index], self.place[index])


class _Search:
    """The state of one search: the best so far, and pairs that wait for their exact score."""

    def __init__(self, kernel: Kernel, queries: PreparedQueries, k: int, ids: Ids) -> None:
        self.kernel, self.queries, self.k = kernel, queries, k
        self.best = Best(len(queries.exact), k, ids)
        self.floor = np.full(len(queries.exact), -np.inf)
        """A score of every query that k rows reach."""
        self.buffer = kernel.buffer(max(_PRODUCTS_AT_ONCE, 1024 * min(len(queries.exact), _QUERIES_AT_ONCE)))
        self.parts: list[Part] = []
        self.waiting: list[_Waiting] = []
        self.held = 0

    def add(self, part: Part, keep: Keep | None) -> None:
        dropped = part.dropped(keep)
        if dropped.all():
            return
        self.parts.append(part)
        odd = part.codes.odd[~dropped[part.codes.odd]]
        if len(odd):
            self._score_all(part, odd, slice(0, len(self.floor)))
        dropped[part.codes.odd] = True
        for start in range(0, len(self.floor), _QUERIES_AT_ONCE):
            which = slice(start, min(start + _QUERIES_AT_ONCE, len(self.floor)))
            self._pass(part, dropped, which)

    def _pass(self, part: Part, dropped: NDArray[np.bool_], which: slice) -> None:
        """A batch of queries through the rows of a part."""
        queries = self.queries.take(which)
        asked = code_queries(part.codes, queries)
        step = max(1024, _PRODUCTS_AT_ONCE // len(queries.exact) // 32 * 32)
        for start in range(0, len(dropped), step):
            drop = dropped[start : start + step]
            products = self.kernel.products(asked.integers, part.placed[start : start + step], self.buffer)
            if drop.any() or products.shape[1] > len(drop):
                self.kernel.drop(products, drop)
            left = len(drop) - int(np.count_nonzero(drop))
            if left >= self.k and np.isinf(self.floor[which]).any():
                self._raise_floor(part, start + self.kernel.best(products, self.k), which)
            least = asked.least(np.ldexp(self.floor[which], -queries.exponent))
            query, place, product = self.kernel.at_least(products, least)
            if len(query) > max(self.k * len(queries.exact), left * len(queries.exact) // _CROWDED):
                self._score_all(part, start + np.flatnonzero(~drop), which)
                continue
            most = asked.base[query] + asked.step[query] * product + asked.error[query]
            index = np.full(len(query), len(self.parts) - 1)
            self.waiting.append(_Waiting(which.start + query, most, index, start + place))
            self.held += len(query)
            if self.held > 4 * self.k * len(self.floor) + 4096:
                self.settle()

    def settle(self) -> None:
        """Exact scores for the waiting pairs: the k most promising of each query, then what these do not rule out."""
        query, most, part, place = (np.concatenate(column) for column in zip(*self.waiting, strict=True))
        self.waiting, self.held = [], 0
        order = np.lexsort((-most, query))
        pairs = _Waiting(query, most, part, place).take(order)
        counts = np.bincount(pairs.query, minlength=len(self.floor))
        rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[pairs.query]
        self._score(pairs.take(rank < self.k))
        floor = np.ldexp(self.floor, -self.queries.exponent)
        rest = (rank >= self.k) & (pairs.most >= floor[pairs.query])
        self._score(pairs.take(rest))

    def _score(self, pairs: _Waiting) -> None:
        for number in np.unique(pairs.part):
            here, part = pairs.part == number, self.parts[number]
            query, place = pairs.query[here], pairs.place[here]
            scores = _pair_scores(part, place, self.queries.exact, query)
            self.best.add(Pool(query, part.group.numbers(place), scores))
        self.best.settle()
        self.floor = np.maximum(self.floor, self.best.kth_score())

    def _score_all(self, part: Part, places: Ints, which: slice) -> None:
        """Rows that codes do not rule out, or say nothing of: through the float32 pass, and exactly."""
        queries = self.queries.take(which)
        step = max(64, _PRODUCTS_AT_ONCE // (4 * max(queries.exact.shape)))
        for start in range(0, len(places), step):
            some = places[start : start + step]
            found = candidates(part.vectors(some), queries, self.floor[which], self.k)
            self.best.add(Pool(which.start + found.query, part.group.numbers(some[found.row]), found.score))
            self.floor = np.maximum(self.floor, self.best.kth_score())

    def _raise_floor(self, part: Part, places: Ints, which: slice) -> None:
        """The least exact score of k rows [queries, k] is one that the k-th best reaches."""
        query = np.repeat(np.arange(which.start, which.stop), places.shape[1])
        scores = _pair_scores(part, places.ravel(), self.queries.exact, query).reshape(places.shape)
        least = np.where(np.isfinite(scores), scores, -np.inf).min(axis=1)
        self.floor[which] = np.maximum(self.floor[which], least)


def top_k_by_codes(
    parts: Iterable[Part], kernel: Kernel, queries: NDArray[Any], k: int, ids: Ids, *, keep: Keep | None = None
) -> TopK:
    """As `topk.top_k`, of row groups with codes."""
    search = _Search(kernel, prepare_queries(queries), k, ids)
    for part in parts:
        search.add(part, keep)
    if search.waiting:
        search.settle()
    return search.best.answer()


def _pair_scores(part: Part, places: Ints, queries: Floats, query: Ints) -> Floats:
    """Exact scores of rows at `places` [n] and of queries `query` [n]; every vector is read once."""
    unique, inverse = np.unique(places, return_inverse=True)
    return exact_pair_scores(part.vectors(unique), queries, inverse, query)
