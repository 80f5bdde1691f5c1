"""The search command: queries -> hits, as a table, JSON lines, paths, or pictures."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import webbrowser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from clipdist import query as queries
from clipdist import terminal
from clipdist.cache import default_cache
from clipdist.config import Section, UserError, together
from clipdist.hits import Hits, save_contact_sheet, save_gallery
from clipdist.interactive import Interactive
from clipdist.query import Query
from clipdist.report import obeyed_by_none
from clipdist.searcher import Find, Searcher

_CONTROLS = re.compile(r"[\x7f-\x9f]")
"""Control characters that JSON leaves as they are."""


class SearchConfig(Section):
    """Embeddings + queries -> hits."""

    embeddings: str
    """What `embed` made."""
    queries: tuple[str, ...] = ()
    """Queries of terms: "red dress + ./pool.jpg - 0.5:floral"; a path or URL is a picture, id:15970 a catalog row."""
    texts: tuple[str, ...] = ()
    """Query texts, taken as they are."""
    images: tuple[str, ...] = ()
    """Query pictures: paths or http(s) URLs."""
    ids: tuple[str, ...] = ()
    """Catalog rows: what is like them, themselves left out."""
    find: Find = "images"
    """What is found: pictures, or texts."""
    top: int = Field(10, ge=1)
    """Hits per query."""
    offset: int = Field(0, ge=0)
    """How many of the best hits are passed over."""
    where: str | None = None
    """Only rows that fit: a condition over the columns, such as "colour = 'red' and price < 50"."""
    min_score: float | None = None
    """No hits with a lower score."""
    collapse: float | None = Field(None, gt=0, le=1)
    """A hit whose cosine with a better one is at least this is a near-duplicate, and left out."""
    model: str | None = None
    """Where the model lies, when it is no longer where the embeddings' stamp says."""
    device: str = "cpu"
    """Where the model and the codes of the vectors are: cpu, or cuda for a GPU."""
    format: Literal["table", "json", "paths"] = "table"
    """A table for people, one JSON object per query, or the picture's place, one hit per line."""
    html: str | None = None
    """Also write a gallery with pictures to this file."""
    sheet: str | None = None
    """Also write a contact sheet to this PNG file."""
    open: bool = False
    """Show the gallery in the browser."""
    preview: bool = False
    """Show the pictures in the terminal, where it can."""
    interactive: bool = False
    """Ask for queries until the end of input; the model stays loaded."""
    cache_gib: float = Field(50, ge=0)
    """How much of this machine's disk may hold what is read from a store, and the codes of the first pass."""
    allow_private_hosts: bool = False
    """Whether picture URLs may lead to addresses inside your network."""

    def asked(self) -> list[Query]:
        """Every query, in the order of the fields. UserError with all that are wrong."""
        found = together(*(partial(queries.parse, text) for text in self.queries))
        if not all(text.strip() for text in self.texts):
            raise UserError("texts: a query text is empty")
        found += [Query.text(text) for text in self.texts]
        found += [Query.image(name) for name in self.images]
        return found + [Query.id(row_id) for row_id in self.ids]


def run(config: SearchConfig) -> None:
    """Prints the hits of every query. UserError for a query that cannot be read, before any is answered."""
    asked = config.asked()
    if not asked and not config.interactive:
        raise UserError('give a query: clipdist search EMBEDDINGS "red dress", or --text, --image, --id; see --help')
    _check_writable({"html": config.html, "sheet": config.sheet})
    searcher = _searcher(config)
    asked = together(*(partial(searcher.ready, query) for query in asked))
    answers = together(*(partial(_find, config, searcher, query) for query in asked))
    for hits in answers:
        _print(config, hits)
    if config.html or config.open:
        _write_gallery(config, answers, config.html, config.open)
    if config.sheet:
        save_contact_sheet(config.sheet, answers)
    if config.interactive:
        _interact(config, searcher)


def dry_run(config: SearchConfig) -> list[tuple[str, str]]:
    config.asked()
    searcher = _searcher(config)
    rows = [(name, f"{len(index):,} vectors") for name, index in (("images", searcher.images),)]
    dim = searcher.encoder.towers.dim
    return [("model", f"{dim} dimensions, the one that made the embeddings"), *rows]


def derived(config: SearchConfig) -> list[tuple[str, str]]:
    return [("queries", str(len(config.asked())))]


def _searcher(config: SearchConfig) -> Searcher:
    return Searcher(
        config.embeddings,
        config.model,
        device=config.device,
        allow_private_hosts=config.allow_private_hosts,
        cache=default_cache(config.cache_gib),
    )


def _find(config: SearchConfig, searcher: Searcher, query: Query) -> Hits:
    return searcher.find(
        query,
        config.top,
        config.find,
        where=config.where,
        offset=config.offset,
        min_score=config.min_score,
        collapse=config.collapse,
    )


def _interact(config: SearchConfig, searcher: Searcher) -> None:
    def open_gallery(hits: Hits, path: str | None) -> None:
        _check_writable({"html": path})
        _write_gallery(config, [hits], path, path is None)

    settings = (config.find, config.top, config.where, config.min_score, config.collapse)
    Interactive(searcher, partial(_print, config), open_gallery, *settings).run()


def _print(config: SearchConfig, hits: Hits) -> None:
    if config.format == "json":
        found = {"query": hits.query, "hits": [hit.to_json() for hit in hits]}
        text = json.dumps(found, ensure_ascii=False, default=str)
        print(_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text), flush=True)
        return
    if config.format == "paths":
        for path in [hit.image_uri.removeprefix("file://") for hit in hits if hit.image_uri]:
            print(obeyed_by_none(path), flush=True)
        return
    how = terminal.protocol(sys.stdout) if config.preview else None
    if how is not None and len(hits):
        terminal.show(hits.tiles(), sys.stdout, how)
    least = "" if config.min_score is None or len(hits) else f" with a score of at least {config.min_score}"
    print(f"{hits}{least}\n", flush=True)


def _check_writable(files: dict[str, str | None]) -> None:
    """UserError before the work and not after it, when a file cannot be written."""
    problems = []
    for name, file in files.items():
        if file is None:
            continue
        path = Path(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()
        except OSError as error:
            problems.append(f"{name}: {path}: cannot be written: {error.strerror}")
    if problems:
        raise UserError(*problems)


def _write_gallery(config: SearchConfig, answers: Sequence[Hits], html: str | None, show: bool) -> None:
    path = Path(html or Path(tempfile.mkdtemp(prefix="clipdist-")) / "hits.html")
    save_gallery(path, answers, intro=config.embeddings)
    if show and not webbrowser.open(path.absolute().as_uri()):
        print(f"no browser was found; the gallery is {path}", file=sys.stderr)
