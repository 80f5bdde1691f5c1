"""Retrieval in both directions, with what counts as right: the same pair, group or caption.

Several processes may share the queries: the values that they find, joined, have the mean of one process to the bit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipdist import metrics
from clipdist.metrics import Floats, Relevance
from clipdist.ranks import positive_ranks

Embeddings = NDArray[np.float32]
EVERY = slice(None)
KS = (1, 5, 10)

POSITIVES = "a hit is any row of the same group (product) or with the same caption"

DIRECTIONS = ("text_to_image", "image_to_text")
HIGHER_IS_BETTER = ("hit_rate@1", "hit_rate@5", "hit_rate@10", "recall@10", "mrr@10", "ndcg@10", "map@10")
"""Metrics that may choose a checkpoint."""


def normal_caption(caption: str) -> str:
    """Captions that differ only in form are the same: NFKC, case folded, spaces collapsed."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


@dataclass(frozen=True)
class Gallery:
    """Pictures and captions to be found by each other. `pair_of_text[j]` is the picture row of caption j."""

    groups: Sequence[str | None]
    captions: Sequence[str]
    pair_of_text: NDArray[np.int64]

    def relevance(self, share: slice = EVERY) -> dict[str, Relevance]:
        """Which rows are right for each query in `share` (of the captions, of the pictures), per direction.

        Time and memory grow with the rows and with the right ones among them, 8 bytes each.
        """
        image_keys: list[set[Hashable]] = [{("row", row)} for row in range(len(self.groups))]
        for row, group in enumerate(self.groups):
            if group:
                image_keys[row].add(("group", group))
        text_keys: list[set[Hashable]] = []
        for caption, row in zip(self.captions, self.pair_of_text, strict=True):
            key = ("caption", normal_caption(caption))
            image_keys[row].add(key)
            group = self.groups[row]
            text_keys.append({("row", int(row)), key} | ({("group", group)} if group else set()))
        return {
            "text_to_image": Relevance.from_keys(text_keys[share], image_keys),
            "image_to_text": Relevance.from_keys(image_keys[share], text_keys),
        }


def query_values(
    images: Embeddings, texts: Embeddings, relevance: Mapping[str, Relevance], share: slice = EVERY
) -> dict[str, Floats]:
    """`<direction>/<metric>` of each query in `share`, against the whole gallery: float64 [queries of the share].

    `images`, `texts` [rows, dim] are L2-normalised and whole; `relevance` is `Gallery.relevance(share)`. Process r of W
    asks the queries `slice(r, None, W)`; `joined` puts the parts together. NaN: a query without a right row.
    """
    found: dict[str, Floats] = {}
    for direction, (queries, gallery) in {"text_to_image": (texts, images), "image_to_text": (images, texts)}.items():
        right = relevance[direction]
        values = metrics.query_values(positive_ranks(queries[share], gallery, right, best=max(KS)), right, KS)
        found |= {f"{direction}/{name}": value for name, value in values.items()}
    return found


def joined(parts: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    """The values of all queries, in order, from those of the shares: parts[r] has `slice(r, None, len(parts))`."""
    whole: dict[str, Floats] = {}
    for name in parts[0]:
        whole[name] = np.empty(sum(len(part[name]) for part in parts))
        for first, part in enumerate(parts):
            whole[name][first :: len(parts)] = part[name]
    return whole


def mean_of(values: Mapping[str, Floats]) -> dict[str, float]:
    """`<direction>/<metric>` over all queries that have a right row, with their number; ValueError where none has."""
    found: dict[str, float] = {}
    for direction in DIRECTIONS:
        start = f"{direction}/"
        own = {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}
        found |= {f"{start}{name}": value for name, value in metrics.mean_of(own).items()}
    return found


def measure(images: Embeddings, texts: Embeddings, relevance: Mapping[str, Relevance]) -> dict[str, float]:
    """`<direction>/<metric>` for both directions in one process; embeddings [rows, dim] are L2-normalised."""
    return mean_of(query_values(images, texts, relevance))
