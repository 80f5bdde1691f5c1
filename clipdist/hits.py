"""Hit: one found row. Hits: what a query found, best first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from PIL import Image

from clipdist import images
from clipdist.images import BadImage
from clipdist.pictures import read_picture


@dataclass(frozen=True)
class Hit:
    """One found row. `score` is the cosine similarity; `columns` holds the passthrough columns."""

    id: str
    description: str | None
    score: float
    image_uri: str | None
    columns: dict[str, Any] = field(default_factory=dict)

    def picture(self) -> Image.Image:
        """The picture, decoded. Raises BadImage when it is gone from where the catalog had it."""
        return images.decode(read_picture(self.image_uri))

    def picture_or_none(self) -> Image.Image | None:
        try:
            return self.picture()
        except BadImage:
            return None


@dataclass(frozen=True)
class Hits(Sequence[Hit]):
    """The hits of one query, best first. `query` is how a person would name it."""

    query: str
    hits: tuple[Hit, ...]

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> Hits: ...
    def __getitem__(self, place: int | slice) -> Hit | Hits:
        return Hits(self.query, self.hits[place]) if isinstance(place, slice) else self.hits[place]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)
