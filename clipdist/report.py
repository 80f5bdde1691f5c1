"""What a job shows a person: plain-text tables, short numbers, and plots as PNG files.

Needs only numpy to import; matplotlib is imported by what draws. Pictures and HTML are in `gallery.py`.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Sequence[object]]  # of a table, one value per column

INK, FAINT, OUTLINE = "#1f2328", "#8b949e", "#5eead4"
LINE_COLOURS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#64748b", "#dc2626")
NO_FONT = "Some characters are drawn as boxes: no font on this machine has them (Noto Sans CJK has most)."
MAX_LABELLED = 64  # rows or columns of a heatmap that still get a legible label each
NUMERIC = re.compile(r"[<>+\-−±~]?\d[\d,.]*(e[+-]?\d+)?( ?(%|[kMGTP]?B|ms|s|min|h|d)( \d+ (s|min|h))?)?|nan|-?inf|–")


# -- text ------------------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """The text on one line: white space collapsed, control characters (which a terminal obeys) dropped."""
    spaced = " ".join(text.split())
    return "".join(char for char in spaced if unicodedata.category(char) != "Cc")


def display_width(text: str) -> int:
    """Columns that a terminal gives the text: wide East-Asian characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)


def shorten(text: str, columns: int) -> str:
    """The text if it fits `columns` terminal columns, else its beginning and an ellipsis."""
    if display_width(text) <= columns:
        return text
    kept = ""
    for char in text:
        if display_width(kept + char) > columns - 1:
            break
        kept += char
    return kept.rstrip() + "…" if columns > 0 else ""


def number(x: float | None) -> str:
    """1234567 -> `1,234,567`, 0.48312 -> `0.483`, 0.000042 -> `4.2e-05`; None -> `–`."""
    if x is None:
        return "–"
    if isinstance(x, Integral):
        return f"{int(x):,}"
    size = abs(x)
    if not math.isfinite(x):
        return str(float(x))
    if size == 0 or 0.001 <= size < 10:
        return f"{x:.3f}"
    return f"{x:.2g}" if size < 0.001 else f"{x:,.1f}" if size < 1000 else f"{x:,.0f}"


def percent(x: float | None) -> str:
    """A share of 1 as per cent, 0.483 -> `48.3 %`. Only nothing is `0.0 %` and only all is `100.0 %`."""
    if x is None or not math.isfinite(x):
        return number(x)
    if 0 < x < 0.0005:
        return "<0.1 %"
    return ">99.9 %" if 0.9995 <= x < 1 else f"{100 * x:.1f} %"


def file_size(n_bytes: float) -> str:
    """Bytes in decimal units, 1_234_000_000 -> `1.2 GB`."""
    size, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.95 else f"{size:.1f} {unit}"


def duration(seconds: float) -> str:
    """A time span in its two largest units, 200 -> `3 min 20 s`, 0.25 -> `250 ms`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    # Each step rounds before it compares, so that 3599.7 is `1 h 0 min` and never `59 min 60 s`.
    if (whole := round(seconds)) < 3600:
        return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
    if (minutes := round(seconds / 60)) < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def cell(value: object) -> str:
    """A table cell as text: numbers by `number`, a truth value as yes or no, None as `–`, others by str."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return number(value) if value is None or isinstance(value, Real) else one_line(str(value))  # type: ignore[arg-type]


def cells(header: Sequence[str], rows: Rows) -> list[list[str]]:
    """Header and rows as text; raises ValueError where a row does not have one entry per column."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"the table has {len(header)} columns {list(header)}, a row has {len(row)}: {list(row)}")
    return [[cell(value) for value in row] for row in (header, *rows)]


def alignment(columns: int, rows: Sequence[Sequence[str]]) -> str:
    """One letter per column: `r` where every cell reads as a number, else `l`."""
    numeric = (rows and all(NUMERIC.fullmatch(row[column]) for row in rows) for column in range(columns))
    return "".join("r" if each else "l" for each in numeric)


def table(
    header: Sequence[str],
    rows: Rows,
    *,
    align: str | None = None,
    max_width: int | None = None,
) -> str:
    """An aligned plain-text table for a terminal, without a final newline.

    `align` is one of `l`, `r`, `c` per column; without it columns of numbers go right. Where the table is
    wider than `max_width`, the widest text cells end in an ellipsis; numbers are never cut. No rows leave one
    line `(none)`.
    Raises ValueError if a row or `align` does not have one entry per column.
    """
    titles, *texts = cells(header, rows)
    aligned = align or alignment(len(header), texts)
    if len(aligned) != len(header) or set(aligned) - set("lrc"):
        raise ValueError(f"align must be one of l, r, c for each of {len(header)} columns, got {align!r}")
    widths = [max(map(display_width, column)) for column in zip(titles, *texts, strict=True)]
    cuttable = [i for i, letter in enumerate(alignment(len(header), texts)) if letter == "l"]
    while max_width and cuttable and sum(widths) + 2 * (len(widths) - 1) > max_width:
        widest = max(cuttable, key=widths.__getitem__)
        if widths[widest] <= 4:
            break
        widths[widest] -= 1

    def line(entries: Sequence[str]) -> str:
        padded = zip(entries, widths, aligned, strict=True)
        return "  ".join(_pad(shorten(text, width), width, side) for text, width, side in padded).rstrip()

    body = [line(entries) for entries in texts] or ["(none)"]
    return "\n".join([line(titles), "  ".join("─" * width for width in widths), *body])


def _pad(text: str, width: int, side: str) -> str:
    spare = width - display_width(text)
    left = {"l": 0, "r": spare, "c": spare // 2}[side]
    return " " * left + text + " " * (spare - left)


# -- plots -----------------------------------------------------------------------------------------------


class Font(NamedTuple):
    """A family's name, the file it is in, and the face's number in that file."""

    family: str
    file: str
    face: int


@functools.cache
def characters(file: str, face: int) -> frozenset[int]:
    """The code points that the font file has a glyph for; empty if it is unreadable or not scalable."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file, face_index=face) if face else FT2Font(file)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (
        OSError,
        RuntimeError,
        TypeError,
    ):  # TypeError: matplotlib before 3.11 reads only a file's first face
        return frozenset()


def fonts(texts: Iterable[str]) -> tuple[list[Font], bool]:
    """The fonts to draw the texts with, the preferred first, and whether they have every character.

    DejaVu Sans comes with matplotlib and is first; what it lacks (Korean, Chinese, ...) is looked for among
    the installed fonts, also those installed after matplotlib listed them.
    """
    from matplotlib.font_manager import findfont, findSystemFonts, fontManager

    chosen = [Font("DejaVu Sans", str(findfont("DejaVu Sans")), 0)]
    missing = {ord(char) for text in texts for char in text if char.isprintable()}
    missing -= characters(chosen[0].file, chosen[0].face)
    _add_fonts(chosen, missing)
    if missing:
        for file in sorted({*findSystemFonts()} - {entry.fname for entry in fontManager.ttflist}):
            with suppress(OSError, RuntimeError):  # a font that matplotlib cannot read does not help
                fontManager.addfont(file)
        _add_fonts(chosen, missing)
    return chosen, not missing


def _add_fonts(chosen: list[Font], missing: set[int]) -> None:
    """Add fonts that matplotlib knows to `chosen`, and take from `missing` the code points that they have."""
    from matplotlib.font_manager import fontManager

    plain = [
        Font(entry.name, entry.fname, int(getattr(entry, "index", 0)))
        for entry in fontManager.ttflist
        if (entry.style, entry.weight) in (("normal", 400), ("normal", "normal"), ("normal", "regular"))
        and not re.search("Last ?Resort|Color", entry.name)  # has no real glyphs; has only coloured ones
    ]
    # Sans-serif fonts of many scripts first, and a fixed order: the same fonts always draw the same picture.
    plain.sort(key=lambda font: ("CJK" not in font.family, not re.search("Sans|Gothic", font.family), font))
    for font in plain if missing else []:
        if covered := missing & characters(font.file, font.face):
            chosen.append(font)
            missing -= covered


@contextmanager
def _figure(path: Path, texts: Iterable[str], size: tuple[float, float], title: str) -> Iterator[tuple[Figure, Axes]]:
    """A styled figure of `size` inches with one plot and fonts for the texts; saved to `path` on leaving."""
    import warnings

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found, complete = fonts([*texts, title])
    style: dict[Any, Any] = {
        "font.family": list(dict.fromkeys(font.family for font in found)),
        "text.parse_math": False,  # a "$" in a caption is a dollar
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure, figure.subplots()
        if not complete:
            figure.supxlabel(NO_FONT, fontsize=7, color=FAINT)
        figure.savefig(path, dpi=150, format="png")


def heatmap(
    matrix: np.ndarray, path: Path, *, title: str, row_labels: Sequence[str], column_labels: Sequence[str]
) -> None:
    """Draw similarities, rows (texts) x columns (images), as a PNG; meant for up to about 48 a side.

    In a square matrix row i is taken to match column i: the diagonal is outlined, and its mean and that of
    the rest stand under the title. A value that is not finite stays white.
    Raises ValueError if the matrix is not 2-d, is empty, or the labels do not fit it.
    """
    values = np.ma.masked_invalid(np.asarray(matrix, dtype=np.float64))
    if values.ndim != 2 or values.size == 0 or values.shape != (len(row_labels), len(column_labels)):
        raise ValueError(
            f"a heatmap needs a matrix (rows, columns) with a label each, got shape {values.shape} with "
            f"{len(row_labels)} row labels and {len(column_labels)} column labels"
        )
    rows, columns = values.shape
    side = max(rows, columns)
    inches = min(max(0.22, 3.6 / side), 10.5 / side)  # per cell: 48 of them, with their labels, fill a screen
    size = (columns * inches + 3.2, rows * inches + 2.6)
    labels = [[shorten(one_line(label), 34) for label in names] for names in (row_labels, column_labels)]
    with _figure(path, labels[0] + labels[1], size, title) as (figure, axes):
        image = axes.imshow(values, cmap="magma", aspect="equal", interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=7)
        axes.set(xticks=[], yticks=[])
        if rows <= MAX_LABELLED:
            axes.set_yticks(range(rows), labels[0])
        if columns <= MAX_LABELLED:
            axes.set_xticks(range(columns), labels[1], rotation=90)
        if rows == columns:
            _mark_diagonal(axes, values)
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, aspect=40, label="similarity")
        bar.outline.set_visible(False)


def _mark_diagonal(axes: Axes, values: np.ma.MaskedArray[Any, Any]) -> None:
    from matplotlib.patches import Rectangle

    count = len(values)
    if count <= MAX_LABELLED:
        for i in range(count):
            axes.add_patch(Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=OUTLINE, linewidth=0.9))
    means = [values.diagonal().mean(), *([values[~np.eye(count, dtype=bool)].mean()] if count > 1 else [])]
    shown = [number(float(np.ma.filled(mean, np.nan))) for mean in means]
    text = ", others ".join(shown)
    axes.set_title(f"similarity of matching pairs {text} (means)", loc="left", fontsize=9, color=FAINT)


def curves(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
) -> None:
    """Draw named lines through (x, y) points as a PNG; `marks` are vertical lines: (x, name)."""
    texts = [*series, x_label, y_label, *(name for _, name in marks)]
    with _figure(path, texts, (8, 4.2), title) as (_, axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.8)
        axes.set(xlabel=x_label, ylabel=y_label)
        for i, (name, points) in enumerate(series.items()):
            xs, ys = zip(*points, strict=True) if points else ((), ())
            marker = "o" if len(points) <= 40 else None  # a lone point has no line
            colour = LINE_COLOURS[i % len(LINE_COLOURS)]
            axes.plot(xs, ys, label=name, color=colour, marker=marker, linewidth=1.8, markersize=4)
        _mark_lines(axes, marks)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=9)


def _mark_lines(axes: Axes, marks: Sequence[tuple[float, str]]) -> None:
    for x, _ in marks:
        axes.axvline(x, color=FAINT, linewidth=1, linestyle=(0, (3, 3)), zorder=0)
    first, last = axes.get_xlim()
    ends: list[float] = []  # where the names already written on each level end, as a share of the width
    for x, name in sorted(marks):
        start = (x - first) / (last - first)
        level = next((i for i, end in enumerate(ends) if end < start), len(ends))
        ends[level : level + 1] = [start + 0.02 + 0.0125 * display_width(name)]
        above: dict[str, Any] = {"xytext": (4, 4 + 11 * level), "textcoords": "offset points"}
        axes.annotate(name, (x, 1), xycoords=axes.get_xaxis_transform(), fontsize=8, color=FAINT, **above)
