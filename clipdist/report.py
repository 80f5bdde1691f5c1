"""What a job shows a person as text: tables, short numbers, sizes and durations.

Plots are in `plots.py`, pictures and HTML in `gallery.py`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

Rows = Sequence[Sequence[object]]  # of a table, one value per column

NUMERIC = re.compile(r"[<>+\-−±~]?\d[\d,.]*(e[+-]?\d+)?( ?(%|[kMGTP]?B|ms|s|min|h|d)( \d+ (s|min|h))?)?|nan|-?inf|–")


_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that make a terminal show what follows in another order."""


def one_line(text: str) -> str:
    """The text on one line: white space collapsed, and without what commands a terminal."""
    return obeyed_by_none(" ".join(text.split()))


def obeyed_by_none(text: str) -> str:
    """The text without control characters, which a terminal obeys, and without what reorders its line."""
    return "".join(char for char in text if unicodedata.category(char) != "Cc" and char not in _REORDERING)


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
