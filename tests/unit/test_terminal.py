"""Pictures in terminals: what each protocol is sent, and nothing to what is no terminal."""

import base64
import io
import re

import pytest
from PIL import Image

from clipdist.gallery import Tile
from clipdist.terminal import draw, protocol, show

TILES = [Tile(Image.new("RGB", (40, 20), colour), "") for colour in ("red", "blue")] + [Tile(None, "gone")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1", "LC_TERMINAL": "iTerm2"}, "blocks"),
        ({"TERM": "dumb"}, None),
        ({}, None),
    ],
)
def test_what_a_terminal_can_show(environment: dict[str, str], expected: str | None) -> None:
    assert protocol(Terminal(), environment) == expected
    assert protocol(io.StringIO(), environment) is None


def test_kitty_gets_the_picture_in_chunks() -> None:
    sent = draw(TILES * 8, "kitty")
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sent)
    assert "".join(f"\x1b_G{head};{data}\x1b\\" for head, data in chunks) == sent
    assert all(len(data) <= 4096 for _, data in chunks)
    assert [head[-3:] for head, _ in chunks] == ["m=1"] * (len(chunks) - 1) + ["m=0"]
    with Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in chunks)))) as strip:
        assert strip.width == 160 * 24
        assert strip.getpixel((75, 75)) == (255, 0, 0)
        assert strip.getpixel((160 + 75, 75)) == (0, 0, 255)


def test_iterm2_gets_a_file() -> None:
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);[^:]*:([^\a]*)\a", draw(TILES, "iterm2"))
    assert match is not None
    data = base64.b64decode(match[2])
    assert len(data) == int(match[1])
    with Image.open(io.BytesIO(data)) as strip:
        assert strip.size == (480, 150)


def test_blocks_have_the_colours_of_their_pixels() -> None:
    lines = draw(TILES, "blocks").split("\n")
    assert {line.count("▀") for line in lines} == {3 * 20}
    assert all(line.endswith("\x1b[0m") for line in lines)
    middle = lines[len(lines) // 2]
    assert "\x1b[38;2;255;0;0;48;2;255;0;0m▀" in middle
    assert "\x1b[38;2;0;0;255;48;2;0;0;255m▀" in middle


def test_as_many_pictures_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    show(TILES * 5, stream, "blocks")
    lines = stream.getvalue().splitlines()
    ranks = [line.split() for line in lines if re.fullmatch(r"[\d ]+", line)]
    assert ranks == [["1", "2"], ["3", "4"], ["5", "6"], ["7", "8"]]
