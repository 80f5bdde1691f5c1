"""Pictures in terminals that can show them: the protocols of kitty and iTerm2, and coloured half blocks."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

import numpy as np
from PIL import Image

from clipdist.gallery import Tile, thumbnail

Protocol = Literal["kitty", "iterm2", "blocks"]

_CELL = 20  # columns of a picture, with the gap behind it
_PIXELS = 160  # of a picture's sides, where the terminal takes pixels
_KITTY_CHUNK = 4096  # bytes of base64 in one escape sequence, by the protocol
_MOST_ROWS = 4  # strips at once: more than a screen scrolls away


def protocol(stream: TextIO, environment: Mapping[str, str] = os.environ) -> Protocol | None:
    """What the terminal behind `stream` says of itself; None where it is none, or says nothing."""
    if not stream.isatty():
        return None
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    inside = "TMUX" in environment or terminal.startswith(("tmux", "screen"))  # passes on neither protocol
    if not inside and ("KITTY_WINDOW_ID" in environment or "kitty" in terminal or program.lower() == "ghostty"):
        return "kitty"
    if not inside and (program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2"):
        return "iterm2"
    colours = environment.get("COLORTERM", "") in ("truecolor", "24bit") or "256color" in terminal
    return "blocks" if colours else None


def show(tiles: Sequence[Tile], stream: TextIO, how: Protocol) -> None:
    """Writes the pictures in strips as wide as the terminal, with their ranks above."""
    per_strip = max(1, shutil.get_terminal_size().columns // _CELL)
    for start in range(0, min(len(tiles), per_strip * _MOST_ROWS), per_strip):
        some = tiles[start : start + per_strip]
        ranks = "".join(f"{tile.rank or start + place:<{_CELL}}" for place, tile in enumerate(some, 1))
        stream.write(f"{ranks.rstrip()}\n{draw(some, how)}\n")
    stream.flush()


def draw(tiles: Sequence[Tile], how: Protocol) -> str:
    """What makes the terminal show these pictures side by side."""
    if how == "blocks":
        return _blocks(_strip(tiles, _CELL, 1))
    strip, buffer = _strip(tiles, _PIXELS, _PIXELS // 16), io.BytesIO()
    strip.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    columns = len(tiles) * _CELL
    if how == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(buffer.getvalue())};width={columns};preserveAspectRatio=1:{data}\a"
    chunks = [data[place : place + _KITTY_CHUNK] for place in range(0, len(data), _KITTY_CHUNK)]
    heads = [f"a=T,f=100,q=2,c={columns}," if place == 0 else "" for place in range(len(chunks))]
    last = len(chunks) - 1
    return "".join(
        f"\x1b_G{head}m={int(place < last)};{chunk}\x1b\\"
        for place, (head, chunk) in enumerate(zip(heads, chunks, strict=True))
    )


def _strip(tiles: Sequence[Tile], side: int, gap: int) -> Image.Image:
    """The pictures on white, each in a square; grey where there is none."""
    strip = Image.new("RGB", (side * len(tiles), side - gap), "white")
    for place, tile in enumerate(tiles):
        small = thumbnail(tile.picture, side - gap)
        if small is None:
            small = Image.new("RGB", (side - gap, side - gap), "#e2e5e9")
        left, top = (side - gap - small.width) // 2, (side - gap - small.height) // 2
        strip.paste(small, (place * side + left, top))
    return strip


def _blocks(strip: Image.Image) -> str:
    """Two pixels a character: the upper one in the colour of the character, the lower one behind it."""
    pixels = np.asarray(strip)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, np.full_like(pixels[:1], 255)])
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀" for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
