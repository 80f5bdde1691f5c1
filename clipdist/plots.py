"""Heatmaps and curves as PNG files, in fonts that have the captions' characters.

Needs only numpy to import; matplotlib is imported by what draws.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clipdist.report import display_width, number, one_line, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, OUTLINE = "#1f2328", "#8b949e", "#5eead4"
LINE_COLOURS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#64748b", "#dc2626")
NO_FONT = "Some characters are drawn as boxes: no font on this machine has them (Noto Sans CJK has most)."
MAX_LABELLED = 64  # rows or columns of a heatmap that still get a legible label each


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
