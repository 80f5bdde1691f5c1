"""Found pictures shown to a person: a contact sheet as a PNG file, a gallery as one self-contained HTML file.

Needs only numpy to import; Pillow, jinja2 and matplotlib (for its font) are imported by what uses them.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from clipdist.plots import FAINT, INK, NO_FONT, characters, fonts
from clipdist.report import Rows, alignment, cells, one_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

FontFiles = tuple[tuple[str, int], ...]  # (file, face), the preferred first

THUMBNAIL = 200  # pixels of a tile's longer side, in both forms
COLUMNS = 10  # of a contact sheet; what was found beyond goes on below
GAP, MARGIN, HEAD, UNDER = (
    16,
    40,
    108,
    66,
)  # pixels of the contact sheet; UNDER a picture: score, two caption lines
RIGHT, WRONG, NEUTRAL, PAPER = "#16a34a", "#d9a5a5", "#e2e5e9", "#f4f5f7"


@dataclass(frozen=True)
class Tile:
    """A picture to show: decoded, encoded, or None where there is none (then a placeholder is shown).

    `score` is the similarity to the query, `right` whether it is one that was looked for (None: not known); `rank` is
    the place among what was found, where that is not the place among the tiles.
    """

    picture: Image | bytes | None
    caption: str
    score: float | None = None
    right: bool | None = None
    id: str = ""
    rank: int | None = None


@dataclass(frozen=True)
class Section:
    """A part of a gallery: a heading (a query's text and/or picture), then tables, figures, found pictures.

    `tiles` in order of rank; a mapping makes named strips, e.g. `{"before": [...], "after": [...]}`.
    Tables are (header, rows) as for `report.table`, figures (caption, PNG file).
    """

    heading: str
    tiles: Sequence[Tile] | Mapping[str, Sequence[Tile]] = ()
    picture: Image | bytes | None = None
    note: str = ""
    tables: Sequence[tuple[Sequence[str], Rows]] = ()
    figures: Sequence[tuple[str, Path]] = ()


def thumbnail(picture: Image | bytes | None, size: int = THUMBNAIL) -> Image | None:
    """The picture as upright RGB on white, at most `size` pixels a side; None if missing or unreadable."""
    if picture is None:
        return None
    from PIL import Image, ImageOps

    try:
        opened = picture
        if isinstance(opened, bytes):
            opened = Image.open(io.BytesIO(opened))
            opened.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
        upright = ImageOps.exif_transpose(opened).convert("RGBA")
    except Exception:  # Pillow raises a dozen kinds for a broken file; a report shows a placeholder instead
        return None
    upright.thumbnail((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(white, upright).convert("RGB")


# -- contact sheet ---------------------------------------------------------------------------------------


def contact_sheet(rows: Sequence[tuple[str | Tile, Sequence[Tile]]], path: Path, *, title: str) -> None:
    """Draw queries and what they found as a PNG: rows of `COLUMNS` per query, at their left it (text or picture).

    Right pictures have a thick green frame and a tick, wrong ones a thin reddish frame; score and caption are
    underneath. Text is in the fonts of the machine: see `plots.fonts`.
    """
    from PIL import Image, ImageDraw

    captions = [tile.caption for query, found in rows for tile in (query, *found) if isinstance(tile, Tile)]
    chosen, complete = fonts([title, *captions, *(query for query, _ in rows if isinstance(query, str))])
    files = tuple((font.file, font.face) for font in chosen)
    row_height = THUMBNAIL + UNDER + 2 * GAP
    columns = min(max((len(found) for _, found in rows), default=0), COLUMNS)
    heights = [max(1, -(-len(found) // COLUMNS)) * row_height for _, found in rows]
    width = max(2 * MARGIN + THUMBNAIL + 2 * GAP + columns * (THUMBNAIL + GAP), 640)
    height = HEAD + max(sum(heights), row_height) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, MARGIN - 6), title, (_bold(), *files), 24, INK, width - 2 * MARGIN)
    if not complete:
        _write(draw, (MARGIN, height - MARGIN), NO_FONT, files, 12, FAINT, width - 2 * MARGIN)
    if not rows:
        _write(draw, (MARGIN, HEAD), "No queries.", files, 16, FAINT, width)
    for i, (query, found) in enumerate(rows):
        top = HEAD + sum(heights[:i])
        draw.line((MARGIN, top - GAP, width - MARGIN, top - GAP), fill=NEUTRAL)
        if isinstance(query, str):
            _write(draw, (MARGIN, top), query, files, 18, INK, THUMBNAIL, lines=9)
        else:
            _draw_tile(sheet, draw, (MARGIN, top), query, "query", files)
        for j, tile in enumerate(found):
            left = MARGIN + THUMBNAIL + 3 * GAP + j % COLUMNS * (THUMBNAIL + GAP)
            _draw_tile(sheet, draw, (left, top + j // COLUMNS * row_height), tile, f"{tile.rank or j + 1}", files)
    sheet.save(path, format="PNG", optimize=True)


def _draw_tile(sheet: Image, draw: ImageDraw, corner: tuple[int, int], tile: Tile, rank: str, files: FontFiles) -> None:
    left, top = corner
    draw.rectangle((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), fill=PAPER)
    picture = thumbnail(tile.picture)
    if picture is None:
        _write(draw, (left + 46, top + THUMBNAIL // 2 - 12), "no picture", files, 18, FAINT, THUMBNAIL)
    else:
        centre = left + (THUMBNAIL - picture.width) // 2, top + (THUMBNAIL - picture.height) // 2
        sheet.paste(picture, centre)
    colour, thickness = {True: (RIGHT, 4), False: (WRONG, 2), None: (NEUTRAL, 1)}[tile.right]
    draw.rectangle((left, top, left + THUMBNAIL - 1, top + THUMBNAIL - 1), outline=colour, width=thickness)
    line = rank + ("" if tile.score is None else f" · {tile.score:.3f}") + (" ✓" if tile.right else "")
    ink = RIGHT if tile.right else FAINT
    _write(draw, (left, top + THUMBNAIL + 7), line, files, 14, ink, THUMBNAIL)
    _write(draw, (left, top + THUMBNAIL + 28), tile.caption, files, 13, INK, THUMBNAIL, lines=2)


def _write(
    draw: ImageDraw,
    corner: tuple[int, int],
    text: str,
    files: FontFiles,
    size: int,
    colour: str,
    width: int,
    lines: int = 1,
) -> None:
    """Draw the text in at most `lines` lines of `width` pixels, the last one ending in an ellipsis if cut."""
    rest = one_line(text)
    for i in range(lines):
        fits = _fitting(rest, files, size, width)
        if fits < len(rest) and i == lines - 1:
            line = rest[: _fitting(rest, files, size, width - size)].rstrip() + "…"
        else:
            space = rest.rfind(" ", 0, fits + 1) if fits < len(rest) else -1
            line = rest[: space if space > 0 else fits]
        x, y = float(corner[0]), corner[1] + round(size * (1.35 * i + 0.93))  # y: the base line of all fonts
        for run, file, face in _runs(line, files):
            font = _font(file, face, size)
            draw.text((x, y), run, fill=colour, font=font, anchor="ls")
            x += font.getlength(run)
        rest = rest[len(line) :].lstrip()


def _fitting(text: str, files: FontFiles, size: int, width: float) -> int:
    """How many characters of the text fit `width` pixels; at least 1."""
    for count in range(1, len(text) + 1):
        runs = _runs(text[:count], files)
        if sum(_font(file, face, size).getlength(run) for run, file, face in runs) > width:
            return max(count - 1, 1)
    return len(text)


def _runs(text: str, files: FontFiles) -> list[tuple[str, str, int]]:
    """The text cut where the font must change, each part with its font file and face."""
    owners = [next((each for each in files if ord(char) in characters(*each)), files[0]) for char in text]
    return [
        ("".join(char for char, _ in part), *owner)
        for owner, part in itertools.groupby(zip(text, owners, strict=True), key=lambda pair: pair[1])
    ]


def _bold() -> tuple[str, int]:
    from matplotlib.font_manager import FontProperties, findfont

    return str(findfont(FontProperties(family="DejaVu Sans", weight="bold"))), 0


@functools.cache
def _font(file: str, face: int, size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(file, size, index=face)


# -- HTML ------------------------------------------------------------------------------------------------


def gallery(
    path: Path,
    *,
    title: str,
    sections: Sequence[Section],
    intro: str = "",
    facts: Mapping[str, str] | None = None,
    tables: Sequence[tuple[Sequence[str], Rows]] = (),
    figures: Sequence[tuple[str, Path]] = (),
) -> None:
    """Write one HTML file that needs nothing else: small JPEGs inside, no script, light and dark.

    After title and `intro`: `facts` (name -> value) in large letters, `tables` and `figures` of the whole
    report (in the forms of `Section`), then the sections. All text is escaped.
    Raises FileNotFoundError for a missing figure, ValueError for a table with a row of the wrong length.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"thumbnail": _jpeg_uri, "png": _png_uri, "table": _html_table}
    source = resources.files("clipdist").joinpath("templates/gallery.html").read_text(encoding="utf-8")
    top = Section(heading="", tables=tables, figures=figures)
    page = environment.from_string(source).render(
        title=title,
        intro=intro,
        facts=facts or {},
        top=top,
        sections=[_page_section(each) for each in sections],
    )
    Path(path).write_text(page, encoding="utf-8")


def strip_html(heading: str, tiles: Sequence[Tile]) -> str:
    """Pictures side by side as a piece of HTML, for a notebook. All text is escaped."""
    figure = (
        '<figure style="display:inline-block;width:160px;margin:4px;vertical-align:top;font:12px sans-serif">'
        '<img src="{}" alt="" style="width:160px;height:160px;object-fit:contain">'
        "<figcaption>{} {}<br>{}</figcaption></figure>"
    )
    shown = [
        figure.format(
            _jpeg_uri(tile.picture),
            tile.rank or rank,
            "" if tile.score is None else f"{tile.score:.4f}",
            escape(tile.caption),
        )
        for rank, tile in enumerate(tiles, 1)
    ]
    return f"<div><p>{escape(heading)}</p>{''.join(shown) or 'no hits'}</div>"


def _page_section(section: Section) -> dict[str, object]:
    """What the template needs of a section beyond the section: its strips, and the score that fills a bar."""
    strips = section.tiles if isinstance(section.tiles, Mapping) else {"": section.tiles} if section.tiles else {}
    scores = [tile.score for tiles in strips.values() for tile in tiles if tile.score is not None]
    return {
        "section": section,
        "strips": strips,
        "full_score": max([s for s in scores if s > 0], default=1.0),
    }


def _html_table(content: tuple[Sequence[str], Rows]) -> dict[str, object]:
    header, *rows = cells(*content)
    return {"header": header, "rows": rows, "align": alignment(len(header), rows)}


def _jpeg_uri(picture: Image | bytes | None) -> str:
    """A data URI of the picture's thumbnail; empty where there is none."""
    small = thumbnail(picture)
    if small is None:
        return ""
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _png_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode("ascii")
