"""Hit: one found row. Hits: what a query found, best first: a table, pictures in a notebook, a gallery, a sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
    """One found row. `rank` counts from 1; `score` is the cosine similarity; `columns` are the passthrough ones."""

    id: str
    description: str | None
    score: float
    image_uri: str | None
    columns: dict[str, Any] = field(default_factory=dict)
    allow_private_hosts: bool = False
    rank: int = 1

    def picture(self) -> Image.Image:
        """The picture, decoded. Raises BadImage when it is gone from where the catalog had it."""
        return images.decode(read_picture(self.image_uri, allow_private_hosts=self.allow_private_hosts))

    def picture_or_none(self) -> Image.Image | None:
        try:
            return self.picture()
        except BadImage:
            return None

    def tile(self) -> Tile:
        return Tile(self.picture_or_none(), self.description or "", self.score, id=self.id, rank=self.rank)

    def to_json(self) -> dict[str, Any]:
        """The columns, and over these what every hit has."""
        own = {name: getattr(self, name) for name in ("rank", "score", "id", "description", "image_uri")}
        return own | {name: value for name, value in self.columns.items() if name not in own}


@dataclass(frozen=True)
class Hits(Sequence[Hit]):
    """The hits of one query, best first. `query` is how a person would name it; `asked` the picture, or the catalog
    row, that it asked with, where it was one alone."""

    query: str
    hits: tuple[Hit, ...]
    asked: Image.Image | Hit | None = field(default=None, repr=False, compare=False)

    @property
    def picture(self) -> Image.Image | None:
        """The query's own picture."""
        return self.asked.picture_or_none() if isinstance(self.asked, Hit) else self.asked

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> Hits: ...
    def __getitem__(self, place: int | slice) -> Hit | Hits:
        return replace(self, hits=self.hits[place]) if isinstance(place, slice) else self.hits[place]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def __str__(self) -> str:
        if not self.hits:
            return f"{one_line(self.query)}\nno hits"
        rows = [[str(hit.rank), f"{hit.score:.4f}", hit.id, hit.description or ""] for hit in self.hits]
        return f"{one_line(self.query)}\n{table(['rank', 'score', 'id', 'description'], rows, max_width=118)}"

    def _repr_html_(self) -> str:
        """Pictures, where a notebook shows these."""
        return strip_html(self.query, self.tiles())

    def tiles(self) -> list[Tile]:
        """With pictures, read a few at a time; None where one is gone."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(Hit.tile, self.hits))

    def save_gallery(self, path: str | Path) -> None:
        """One HTML file that needs nothing else."""
        save_gallery(path, [self])

    def save_contact_sheet(self, path: str | Path) -> None:
        """A PNG file."""
        save_contact_sheet(path, [self])


def save_gallery(path: str | Path, answers: Sequence[Hits], intro: str = "") -> None:
    """One HTML file of several queries."""
    sections = [Section(hits.query, hits.tiles(), hits.picture, "" if hits.hits else "no hits") for hits in answers]
    gallery(Path(path), title="Search", intro=intro, sections=sections)


def save_contact_sheet(path: str | Path, answers: Sequence[Hits]) -> None:
    """One PNG file of several queries."""
    rows = [(Tile(hits.picture, hits.query) if hits.asked else hits.query, hits.tiles()) for hits in answers]
    contact_sheet(rows, Path(path), title="Search")
