"""What a person is shown: tables, short numbers, plots, contact sheets and galleries."""

import base64
import io
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdist import plots
from clipdist.gallery import Section, Tile, contact_sheet, gallery, thumbnail
from clipdist.plots import curves, heatmap
from clipdist.report import display_width, duration, file_size, number, percent, table

INJECTION = '<script>alert("x")</script><img src=https://example.com/a.png>'


def picture_bytes(size: tuple[int, int] = (60, 40), colour: str = "red", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=form)
    return buffer.getvalue()


def has_colour(path: Path, colour: str) -> bool:
    """Whether a pixel of the picture has about this colour."""
    wanted = np.array(Image.new("RGB", (1, 1), colour)).reshape(3).astype(int)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return bool((np.abs(pixels - wanted).max(axis=-1) <= 6).any())


# -- import ----------------------------------------------------------------------------------------------


def test_importing_the_modules_loads_no_drawing_library():
    heavy = {"matplotlib", "PIL", "jinja2", "torch", "ray", "pyarrow"}
    code = "import sys, clipdist.report, clipdist.plots, clipdist.gallery{}; print(*sys.modules)"

    def loaded(also: str) -> set[str]:
        command = [sys.executable, "-c", code.format(also)]
        return heavy & set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    assert loaded("") == set()
    assert loaded(", jinja2") == {"jinja2"}  # the control


# -- text ------------------------------------------------------------------------------------------------


def test_table_puts_numbers_right_and_text_left():
    rows = [["shirt", 7, "48.3 %"], ["watches", 1234, "<0.1 %"], ["bag", None, "100.0 %"]]
    assert table(["what", "count", "share"], rows).splitlines() == [
        "what     count    share",
        "───────  ─────  ───────",
        "shirt        7   48.3 %",
        "watches  1,234   <0.1 %",
        "bag          –  100.0 %",
    ]


def test_table_counts_wide_characters_as_two_columns():
    lines = table(["caption", "n"], [["빨간 원피스", 1], ["dress", 22], ["日本", 333]]).splitlines()
    assert {display_width(line) for line in lines} == {len("빨간 원피스") + 5 + 2 + 3}


def test_table_fits_its_width_by_shortening_text_and_never_numbers():
    rows = [["a long caption " * 5, 123456789, "빨간색 " * 20], ["short", 1, "x"]]
    text = table(["caption", "price", "korean"], rows, max_width=50)
    assert max(map(display_width, text.splitlines())) <= 50
    assert "123,456,789" in text
    assert text.count("…") == 2
    assert max(map(display_width, table(["caption", "price", "korean"], rows).splitlines())) > 50


def test_table_without_rows_or_with_a_given_alignment():
    assert table(["a", "b"], []) == "a  b\n─  ─\n(none)"
    assert table(["abc", "abc"], [["1", "x"]], align="cr").splitlines()[-1] == " 1     x"


def test_table_cell_cannot_break_the_line_or_command_the_terminal():
    text = table(["caption"], [["two\nlines\tand \x1b[31mred\x07"]])
    assert text.splitlines()[-1] == "two lines and [31mred"
    assert len(text.splitlines()) == 3


def test_table_cell_cannot_be_shown_in_another_order():
    text = table(["file"], [["photo\u202egpj.exe\u2066\x9b31m"]])
    assert text.splitlines()[-1] == "photogpj.exe31m"


@pytest.mark.parametrize(("rows", "align"), [([["x"]], None), ([["x", 1, 2]], None), ([], "l"), ([], "lx")])
def test_table_refuses_what_does_not_fit_the_header(rows, align):
    with pytest.raises(ValueError, match="2 columns"):
        table(["a", "b"], rows, align=align)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(1234567), "1,234,567"),
        (number(np.int64(1234)), "1,234"),
        (number(0.48312), "0.483"),
        (number(np.float32(-2.5)), "-2.500"),
        (number(123.456), "123.5"),
        (number(98765.4), "98,765"),
        (number(0.000042), "4.2e-05"),
        (number(0.0), "0.000"),
        (number(float("nan")), "nan"),
        (number(None), "–"),
        (percent(0.4832), "48.3 %"),
        (percent(0), "0.0 %"),
        (percent(1e-6), "<0.1 %"),
        (percent(0.99999), ">99.9 %"),
        (percent(1), "100.0 %"),
        (percent(-0.031), "-3.1 %"),
        (file_size(0), "0 B"),
        (file_size(999), "999 B"),
        (file_size(999_600), "1.0 MB"),
        (file_size(1_234_000_000), "1.2 GB"),
        (file_size(151_000_000), "151 MB"),
        (duration(0.25), "250 ms"),
        (duration(9.3), "9.3 s"),
        (duration(59.4), "59 s"),
        (duration(200), "3 min 20 s"),
        (duration(3599.7), "1 h 0 min"),
        (duration(7500), "2 h 5 min"),
        (duration(86_399), "1 d 0 h"),
    ],
)
def test_short_forms(shown, expected):
    assert shown == expected


def test_durations_never_show_a_full_unit():
    shown = [duration(seconds / 7) for seconds in range(0, 700_000, 13)]
    assert not [text for text in shown if text.startswith(("1000 ms", "60 ", "24 h")) or " 60 " in text]


# -- plots -----------------------------------------------------------------------------------------------


def test_heatmap_draws_any_caption_without_a_warning(tmp_path):
    labels = ["plain", "cost $5 or $\\frac{", "빨간색 원피스", "two\nlines " * 30]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sides = {"row_labels": labels, "column_labels": labels}
        heatmap(np.eye(4, dtype=np.float16), tmp_path / "h.png", title="$x$ _", **sides)
    assert Image.open(tmp_path / "h.png").format == "PNG"


def test_heatmap_outlines_the_diagonal_of_a_square_matrix_only(tmp_path):
    for columns in (6, 5):
        sides = {"row_labels": ["r"] * 6, "column_labels": ["c"] * columns}
        heatmap(np.zeros((6, columns)), tmp_path / f"{columns}.png", title="t", **sides)
    assert has_colour(tmp_path / "6.png", plots.OUTLINE)
    assert not has_colour(tmp_path / "5.png", plots.OUTLINE)


def test_heatmap_of_a_sample_fits_a_screen(tmp_path):
    labels = [f"caption number {i} of the sample" for i in range(48)]
    matrix = np.random.default_rng(0).normal(size=(48, 48))
    matrix[3, 3] = np.nan
    heatmap(matrix, tmp_path / "h.png", title="t", row_labels=labels, column_labels=labels)
    width, height = Image.open(tmp_path / "h.png").size
    assert 1000 < width < 2200
    assert 1000 < height < 2200


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (3, 4)])
def test_heatmap_refuses_a_matrix_that_its_labels_do_not_fit(tmp_path, shape):
    sides = {"row_labels": ["r"] * 3, "column_labels": ["c"] * 3}
    with pytest.raises(ValueError, match="3 row labels and 3 column labels"):
        heatmap(np.zeros(shape), tmp_path / "h.png", title="t", **sides)


def test_a_character_without_a_font_is_named_on_the_picture(tmp_path, monkeypatch):
    def draw(name: str) -> bytes:
        curves(tmp_path / name, {"caf\u00e9": [(0, 1), (1, 0)]}, title="t", x_label="x", y_label="y")
        return (tmp_path / name).read_bytes()

    complete = draw("a.png")
    monkeypatch.setattr(plots, "characters", lambda file, face: frozenset(range(128)))
    assert plots.fonts(["cafe"])[1]
    assert not plots.fonts(["caf\u00e9"])[1]
    assert draw("b.png") != complete


def test_curves_draw_every_series(tmp_path):
    series = {"loss": [(0, 2.0), (1, 1.0), (2, float("nan")), (3, 0.5)], "validation": [(1, 1.5)], "none": []}
    marks = [(0, "projections"), (0.1, "all layers"), (2, "$high_resolution")]
    curves(tmp_path / "c.png", series, title="t", x_label="step", y_label="loss", marks=marks)
    assert has_colour(tmp_path / "c.png", plots.LINE_COLOURS[0])
    assert has_colour(tmp_path / "c.png", plots.LINE_COLOURS[1])
    assert not has_colour(tmp_path / "c.png", plots.LINE_COLOURS[5])
    curves(tmp_path / "empty.png", {}, title="t", x_label="x", y_label="y")


# -- pictures --------------------------------------------------------------------------------------------


def test_thumbnail_is_small_upright_and_on_white():
    assert thumbnail(picture_bytes((3000, 1500), form="JPEG")).size == (200, 100)
    assert thumbnail(Image.new("L", (20, 10))).size == (20, 10)
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    assert thumbnail(clear).getpixel((5, 5)) == (255, 255, 255)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(buffer, format="JPEG", exif=exif)
    assert thumbnail(buffer.getvalue()).size == (20, 40)


@pytest.mark.parametrize("broken", [None, b"", b"not a picture", picture_bytes((300, 300))[:60]])
def test_thumbnail_of_no_picture_is_none(broken):
    assert thumbnail(broken) is None


def test_thumbnail_leaves_the_picture_alone():
    picture = Image.open(io.BytesIO(picture_bytes((900, 600), form="JPEG")))
    thumbnail(picture)
    assert picture.size == (900, 600)


def test_contact_sheet_frames_right_pictures_green(tmp_path):
    for right in (True, False, None):
        tiles = [Tile(picture_bytes(), "a red shirt " * 20, 0.5, right), Tile(None, "gone", None, None)]
        contact_sheet([("빨간 shirt", tiles), (tiles[0], [])], tmp_path / f"{right}.png", title="Found")
    drawn = {right: has_colour(tmp_path / f"{right}.png", "#16a34a") for right in (True, False)}
    # The query of the second row is a tile too, hence the same frame.
    assert drawn == {True: True, False: False}
    assert has_colour(tmp_path / "None.png", "red")


def test_contact_sheet_grows_with_what_was_found_and_may_be_empty(tmp_path):
    tile = Tile(Image.new("RGB", (30, 30)), "c", 0.1, np.True_)
    sizes = []
    for i, rows in enumerate([[], [("q", [tile] * 4)], [("q", [tile] * 8), ("no hit", [])]]):
        contact_sheet(rows, tmp_path / f"{i}.png", title="t")
        sizes.append(Image.open(tmp_path / f"{i}.png").size)
    assert sizes[0][0] < sizes[1][0] < sizes[2][0]
    assert sizes[0][1] <= sizes[1][1] < sizes[2][1]


def test_contact_sheet_of_many_goes_on_below(tmp_path):
    for count in (10, 11, 300):
        tiles = [Tile(None, "c", rank=100 + place) for place in range(count)]
        contact_sheet([("q", tiles), (tiles[0], tiles[:1])], tmp_path / f"{count}.png", title="t")
    wide, longer, longest = (Image.open(tmp_path / f"{count}.png").size for count in (10, 11, 300))
    assert wide[0] == longer[0] == longest[0]
    assert longest[1] - longer[1] == 28 * (longer[1] - wide[1])


# -- gallery ---------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags of a page, what it refers to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.classes: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.classes += [value or "" for name, value in attrs if name == "class"]

    def handle_data(self, data):
        self.text += data

    def foreign(self) -> list[str]:
        inside = ("data:image/jpeg;base64,", "data:image/png;base64,", "#")
        return [each for each in self.references if not each.startswith(inside)]

    def pictures(self, form: str) -> list[bytes]:
        start = f"data:image/{form};base64,"
        return [base64.b64decode(each[len(start) :]) for each in self.references if each.startswith(start)]


def test_gallery_needs_nothing_but_itself_and_escapes_all_text(tmp_path):
    (tmp_path / "figure.png").write_bytes(picture_bytes())
    tile = Tile(picture_bytes(), INJECTION, 0.5, True, INJECTION)
    everything = {
        "tables": [([INJECTION], [[INJECTION]])],
        "figures": [(INJECTION, tmp_path / "figure.png")],
    }
    section = Section(INJECTION, {INJECTION: [tile]}, picture_bytes(), INJECTION, **everything)
    path = tmp_path / "report.html"
    gallery(path, title=INJECTION, intro=INJECTION, facts={INJECTION: INJECTION}, sections=[section], **everything)
    page = Page(path)
    assert "script" not in page.tags
    assert page.foreign() == []
    assert page.text.count(INJECTION) >= 13
    assert [each for each in page.pictures("png") if each != picture_bytes()] == []
    assert "@import" not in page.text
    assert "url(" not in page.text

    path.write_text(path.read_text().replace("&lt;", "<").replace("&gt;", ">").replace("&#34;", '"'))
    assert "script" in Page(path).tags  # the control: without escaping both checks fail
    assert Page(path).foreign() != []


def test_gallery_shows_rank_score_id_and_what_is_right(tmp_path):
    tiles = [
        Tile(picture_bytes(), "a shirt", np.float32(0.5), np.True_, "007"),
        Tile(None, "빨간 원피스", 0.25, np.False_, "008"),
        Tile(b"broken", "no score", None, None),
    ]
    section = Section("shirts", {"before": tiles[1:], "after": tiles}, tables=[(["k", "hit rate"], [[1, 0.5]])])
    gallery(tmp_path / "g.html", title="Search", sections=[section], facts={"pictures": "4,000"})
    page, source = Page(tmp_path / "g.html"), (tmp_path / "g.html").read_text(encoding="utf-8")
    for shown in (
        "Search",
        "shirts",
        "before",
        "after",
        "0.500",
        "0.250",
        "007",
        "빨간 원피스",
        "hit rate",
        "4,000",
    ):
        assert shown in page.text
    assert page.text.count("✓") == 1
    assert "1 of 3 right" not in page.text  # of three shown, two were judged
    assert "1 of 2 right" in page.text
    assert [page.classes.count(f"tile{kind}") for kind in (" right", " wrong", "")] == [1, 2, 2]
    assert page.classes.count("picture none") == 4
    assert source.count("width:100.0%") == 1
    assert source.count("width:50.0%") == 2


def test_gallery_of_large_pictures_stays_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (800, 1200, 3), dtype=np.uint8)
    tiles = [Tile(Image.fromarray(noise), f"picture {i}", 0.3) for i in range(10)]
    gallery(tmp_path / "g.html", title="t", sections=[Section("q", tiles)])
    found = Page(tmp_path / "g.html").pictures("jpeg")
    assert [Image.open(io.BytesIO(each)).size for each in found] == [(200, 133)] * 10
    assert (tmp_path / "g.html").stat().st_size < 400_000  # noise is the worst case for JPEG


def test_gallery_may_be_empty_and_refuses_what_it_cannot_show(tmp_path):
    gallery(tmp_path / "g.html", title="t", sections=[Section("nothing found"), Section("", [])])
    assert "nothing found" in Page(tmp_path / "g.html").text
    with pytest.raises(FileNotFoundError):
        gallery(tmp_path / "g.html", title="t", sections=[], figures=[("gone", tmp_path / "gone.png")])
    with pytest.raises(ValueError, match="2 columns"):
        gallery(tmp_path / "g.html", title="t", sections=[], tables=[(["a", "b"], [["only one"]])])
