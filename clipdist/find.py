"""The search job: queries -> hits, as a table, JSON lines or a gallery with pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from clipdist.config import Section, UserError
from clipdist.gallery import Section as GallerySection
from clipdist.gallery import Tile, gallery
from clipdist.hits import Hit
from clipdist.report import table
from clipdist.searcher import Searcher, open_picture

Find = Literal["images", "texts"]


class SearchConfig(Section):
    """Embeddings + queries -> hits."""

    embeddings: str
    """What `embed` made."""
    texts: tuple[str, ...] = ()
    """Query texts."""
    images: tuple[str, ...] = ()
    """Query pictures: paths or http(s) URLs."""
    find: Find = "images"
    """What picture queries find: images like them, or texts that fit them. Texts find images."""
    top: int = Field(10, ge=1)
    """Hits per query."""
    where: str | None = None
    """Only rows that fit: a condition over the columns, such as "colour = 'red' and price < 50"."""
    min_score: float | None = None
    """No hits with a lower score."""
    model: str | None = None
    """Where the model lies, when it is no longer where the embeddings' stamp says."""
    format: Literal["table", "json"] = "table"
    """A table for people, or one JSON object per query."""
    html: str | None = None
    """Also write a gallery with pictures to this file."""
    allow_private_hosts: bool = False
    """Whether picture URLs may lead to addresses inside your network."""


def run(config: SearchConfig) -> None:
    """Prints the hits of every query. UserError for a query that cannot be read, before any is answered."""
    if not config.texts and not config.images:
        raise UserError("give a query: --text TEXT or --image FILE_OR_URL")
    if config.texts and config.find == "texts":
        raise UserError("texts find images; --for texts is for picture queries")
    _check_writable(config.html)
    pictures = {name: open_picture(name, allow_private_hosts=config.allow_private_hosts) for name in config.images}
    searcher = Searcher(config.embeddings, config.model, allow_private_hosts=config.allow_private_hosts)
    answers: list[tuple[str, Sequence[Hit]]] = []
    for text in config.texts:
        answers.append((text, _good(config, searcher.find_image_from_text(text, config.top, config.where))))
    for name, picture in pictures.items():
        find = searcher.find_image_from_image if config.find == "images" else searcher.find_text_from_image
        answers.append((name, _good(config, find(picture, config.top, config.where))))
    for query, hits in answers:
        _print(config, query, hits)
    if config.html is not None:
        _write_gallery(config, answers, pictures)


def _good(config: SearchConfig, hits: Sequence[Hit]) -> Sequence[Hit]:
    return hits if config.min_score is None else [hit for hit in hits if hit.score >= config.min_score]


def dry_run(config: SearchConfig) -> list[tuple[str, str]]:
    searcher = Searcher(config.embeddings, config.model)
    return [("model", f"{searcher.towers.dim} dimensions, the one that made the embeddings")]


def derived(config: SearchConfig) -> list[tuple[str, str]]:
    return [("queries", f"{len(config.texts)} texts, {len(config.images)} pictures")]


def _print(config: SearchConfig, query: str, hits: Sequence[Hit]) -> None:
    if config.format == "json":
        found = [
            {
                "id": h.id,
                "score": h.score,
                "description": h.description,
                "image_uri": h.image_uri,
                **h.columns,
            }
            for h in hits
        ]
        print(json.dumps({"query": query, "hits": found}, ensure_ascii=False, default=str))
        return
    rows = [[rank, f"{hit.score:.4f}", hit.id, hit.description or ""] for rank, hit in enumerate(hits, 1)]
    if not rows:
        least = "" if config.min_score is None else f" with a score of at least {config.min_score}"
        print(f"{query}\nno hits{least}\n")
        return
    print(f"{query}\n{table(['rank', 'score', 'id', 'description'], rows, max_width=118)}\n")


def _check_writable(html: str | None) -> None:
    """UserError before the work and not after it, when the gallery's file cannot be written."""
    if html is None:
        return
    path = Path(html)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"html: {path}: cannot be written: {error.strerror}") from None


def _write_gallery(config: SearchConfig, answers: Sequence[tuple[str, Sequence[Hit]]], pictures: dict) -> None:  # type: ignore[type-arg]
    path = Path(config.html or "")
    sections = []
    for query, hits in answers:
        tiles = [Tile(hit.picture_or_none(), hit.description or "", hit.score, id=hit.id) for hit in hits]
        sections.append(GallerySection(query, tiles, picture=pictures.get(query)))
    gallery(path, title="Search", intro=f"{config.embeddings}", sections=sections)
