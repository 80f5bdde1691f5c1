"""Hit: one found row. Hits: what a query found, best first: a table, pictures in a notebook, a gallery, a sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from PIL import Image

from clipdist import images
from clipdist.gallery import Section, Tile, contact_sheet, gallery, strip_html
from clipdist.images import BadImage
from clipdist.pictures import read_picture
from clipdist.report import one_line, table

_READERS = 8
"""Pictures that are read at a time."""


@dataclass(frozen=True)
class Hit:
    """One found row. `score` is the cosine similarity; `columns` holds the passthrough columns."""

    id: str
    description: str | None
    score: float
    image_uri: str | None
    columns: dict[str, Any] = field(default_factory=dict)
    allow_private_hosts: bool = False

    def picture(self) -> Image.Image:
        """The picture, decoded. Raises BadImage when it is gone from where the catalog had it."""
        return images.decode(read_picture(self.image_uri, allow_private_hosts=self.allow_private_hosts))

    def picture_or_none(self) -> Image.Image | None:
        try:
            return self.picture()
        except BadImage:
            return None

    def tile(self) -> Tile:
        return Tile(self.picture_or_none(), self.description or "", self.score, id=self.id)

    def to_json(self) -> dict[str, Any]:
        own = {"id": self.id, "score": self.score, "description": self.description, "image_uri": self.image_uri}
        return own | self.columns


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

    def __str__(self) -> str:
        if not self.hits:
            return f"{one_line(self.query)}\nno hits"
        rows = [[rank, f"{hit.score:.4f}", hit.id, hit.description or ""] for rank, hit in enumerate(self.hits, 1)]
        return f"{one_line(self.query)}\n{table(['rank', 'score', 'id', 'description'], rows, max_width=118)}"

    def _repr_html_(self) -> str:
        """Pictures, where a notebook shows these."""
        return strip_html(self.query, self.tiles())

    def tiles(self) -> list[Tile]:
        """With pictures, read a few at a time; None where one is gone."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(Hit.tile, self.hits))

    def section(self, picture: Image.Image | None = None) -> Section:
        """A part of a gallery; `picture`: the query's own."""
        return Section(self.query, self.tiles(), picture=picture)

    def save_gallery(self, path: str | Path) -> None:
        """One HTML file that needs nothing else."""
        gallery(Path(path), title="Search", sections=[self.section()])

    def save_contact_sheet(self, path: str | Path) -> None:
        """A PNG file."""
        contact_sheet([(self.query, self.tiles())], Path(path), title="Search")
