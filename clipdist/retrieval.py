"""Retrieval in both directions, with what counts as right: the same pair, group or caption."""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipdist.metrics import Relevance, positive_ranks, summary

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

    def relevance(self) -> dict[str, Relevance]:
        """Which rows are right for each query, per direction."""
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
            "text_to_image": Relevance.from_keys(text_keys, image_keys),
            "image_to_text": Relevance.from_keys(image_keys, text_keys),
        }


def measure(
    images: NDArray[np.float32], texts: NDArray[np.float32], relevance: dict[str, Relevance]
) -> dict[str, float]:
    """`<direction>/<metric>` for both directions; embeddings [rows, dim] are L2-normalised."""
    found: dict[str, float] = {}
    for direction, (queries, gallery) in {
        "text_to_image": (texts, images),
        "image_to_text": (images, texts),
    }.items():
        ranks = positive_ranks(queries, gallery, relevance[direction])
        found |= {f"{direction}/{name}": value for name, value in summary(ranks, relevance[direction]).items()}
    return found
