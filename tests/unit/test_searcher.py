"""Searching as a person does, with a stand-in for the model: every form of query, pages, and what is printed and saved."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipdist import cli, find
from clipdist import searcher as searchers
from clipdist.config import UserError
from clipdist.hits import Hit, Hits
from clipdist.query import Query
from clipdist.search import Index
from clipdist.searcher import Searcher
from clipdist.shards import Shards
from tests.conftest import draw_shape
from tests.unit.some_shards import some_vectors, write_embeddings

ROOT = Path(__file__).parents[2]
STORED = some_vectors(60, 16)


class StandIn:
    """Embeds a text as its characters, a picture as its mean colour."""

    def __init__(self, *_: Any) -> None:
        pass

    def text(self, text: str) -> Any:
        found = np.zeros(16, np.float32)
        for character in text:
            found[ord(character) % 16] += 1
        return found / np.linalg.norm(found)

    def image(self, picture: Image.Image) -> Any:
        found = np.ones(16, np.float32)
        found[:3] += np.asarray(picture, np.float32).mean(axis=(0, 1))
        return found / np.linalg.norm(found)


@pytest.fixture
def embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows with ids "0", "7919", ...; pictures of the first few are there."""
    monkeypatch.setattr("clipdist.query_encoder.QueryEncoder", StandIn)
    uri = str(tmp_path / "embeddings")
    write_embeddings(uri, [STORED[:25], STORED[25:]])
    return uri


@pytest.fixture
def searcher(embeddings: str) -> Searcher:
    return Searcher(embeddings)


def ids_of(vector: Any, k: int = 10) -> list[str]:
    scores = STORED.astype(np.float64) @ np.asarray(vector, np.float64)
    return [str(row * 7919 % 100_003) for row in np.argsort(-scores, kind="stable")[:k]]


def test_every_form_of_query(searcher: Searcher, tmp_path: Path) -> None:
    picture, stand_in = draw_shape("red", "circle", 0), StandIn()
    picture.save(tmp_path / "red.png")
    expected = ids_of(stand_in.image(picture))
    for form in (picture, np.asarray(picture), tmp_path / "red.png", str(tmp_path / "red.png")):
        assert [hit.id for hit in searcher.find_image_from_image(form)] == expected
    assert [hit.id for hit in searcher.find_image_from_text("dress")] == ids_of(stand_in.text("dress"))
    assert [hit.id for hit in searcher.find(STORED[3])] == ids_of(STORED[3])
    mixed = "dress" + Query(picture) - 0.5 * Query("shoe")
    vector = stand_in.text("dress") + stand_in.image(picture) - 0.5 * stand_in.text("shoe")
    assert [hit.id for hit in searcher.find(mixed)] == ids_of(vector)


def test_more_like_a_row_without_itself(searcher: Searcher) -> None:
    row_id = str(3 * 7919 % 100_003)
    assert ids_of(STORED[3])[0] == row_id
    assert [hit.id for hit in searcher.find_image_from_id(row_id, 5)] == ids_of(STORED[3])[1:6]
    assert [hit.id for hit in searcher.find_image_from_id(row_id, 5, offset=2)] == ids_of(STORED[3])[3:8]
    assert len(searcher.find_image_from_id(row_id, 100)) == 59
    with pytest.raises(UserError, match='no picture has the id "nobody"'):
        searcher.find_image_from_id("nobody")


def test_pages_filters_and_scores(searcher: Searcher) -> None:
    whole = searcher.find_image_from_text("dress", 60)
    assert [hit.id for hit in searcher.find_image_from_text("dress", 7, offset=5)] == [hit.id for hit in whole[5:12]]
    cheap = searcher.find_image_from_text("dress", 60, "price < 5")
    assert [hit.id for hit in cheap] == [hit.id for hit in whole if hit.columns["price"] < 5]
    good = searcher.find_image_from_text("dress", 60, min_score=0.1)
    assert [hit.id for hit in good] == [hit.id for hit in whole if hit.score >= 0.1]
    for wrong in ({"k": 0}, {"k": 3, "offset": -1}):
        with pytest.raises(UserError, match="at least"):
            searcher.find_image_from_text("dress", **wrong)


@pytest.mark.parametrize(
    ("query", "told"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.ones(5), "vector of 5 numbers"),
        (np.full(16, np.nan), "not finite"),
        (Path("no-such.jpg"), "no-such.jpg: missing"),
        (Query.image("http://127.0.0.1:1/a.jpg"), "private_address"),
        (Query.image("ftp://example.com/a.jpg"), "ftp"),
    ],
)
def test_queries_that_cannot_be_read(searcher: Searcher, query: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        searcher.find(query)


def test_without_texts_and_pictures_no_model_is_loaded(embeddings: str) -> None:
    code = f"""
import sys
from clipdist.searcher import Searcher
searcher = Searcher({embeddings!r})
assert len(searcher.find_image_from_id("7919", 3)) == 3
assert len(searcher.find(searcher.images.vector("7919"))) == 10
print({{"torch", "open_clip", "ray", "matplotlib", "jinja2"}} & set(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


# --- What is shown ---------------------------------------------------------------------------------------------------


def evil_hits() -> Any:

    hits = [
        Hit("1", "<script>alert(1)</script>\x1b[31m red", 0.5, "javascript:alert(1)"),
        Hit("2\x1b]0;title\x07", None, 0.25, None, rank=2),
    ]
    return Hits("a <b>query</b>\x1b[0m", tuple(hits))


def test_texts_of_others_stay_texts(tmp_path: Path) -> None:
    hits = evil_hits()
    assert "\x1b" not in str(hits)
    assert "\x07" not in str(hits)
    hits.save_gallery(tmp_path / "hits.html")
    for html in (hits._repr_html_(), (tmp_path / "hits.html").read_text()):
        assert "<script>alert" not in html
        assert "<b>query" not in html
        assert "javascript:" not in html
    hits.save_contact_sheet(tmp_path / "hits.png")
    with Image.open(tmp_path / "hits.png") as sheet:
        assert sheet.width > 500


def test_hits_print_as_a_table(searcher: Searcher) -> None:
    lines = str(searcher.find_image_from_text("dress", 3)).splitlines()
    assert lines[0] == "dress"
    assert lines[1].split() == ["rank", "score", "id", "description"]
    assert len({line.index("  ") for line in lines[3:]}) == 1
    assert str(searcher.find_image_from_text("dress", 3, "price > 1000")) == "dress\nno hits"


def test_ranks_stay_with_their_hits(searcher: Searcher, tmp_path: Path) -> None:
    hits = searcher.find_image_from_text("dress", 6, offset=10)
    assert [hit.rank for hit in hits] == [11, 12, 13, 14, 15, 16]
    page = hits[4:]
    assert isinstance(page, Hits)
    assert [line.split()[0] for line in str(page).splitlines()[3:]] == ["15", "16"]
    page.save_gallery(tmp_path / "page.html")
    for html in (page._repr_html_(), (tmp_path / "page.html").read_text()):
        assert "15" in html
        assert "data:image" not in html, "their pictures are gone"


def test_a_query_of_one_picture_is_shown_beside_its_hits(
    searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert searcher.find_image_from_text("dress").picture is None
    assert searcher.find(Query(draw_shape("red", "circle", 0)) + "dress").picture is None
    shown = searcher.find_image_from_image(draw_shape("red", "circle", 0))
    assert shown.picture is not None
    shown.save_gallery(tmp_path / "shown.html")
    assert (tmp_path / "shown.html").read_text().count("data:image/jpeg") == 1
    like = searcher.find_image_from_id("7919")
    assert like.picture is None, "it is gone from where the catalog had it"
    monkeypatch.setattr("clipdist.hits.read_picture", lambda uri, **_: _png(uri == "/pictures/1.jpg"))
    assert like.picture is not None
    assert np.asarray(like.picture).max() == 255


def _png(white: bool) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 255 * white).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("allowed", [False, True])
def test_pictures_of_hits_come_from_private_hosts_only_where_allowed(
    embeddings: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def fetched(url: str, *, max_bytes: int, allow_private_hosts: bool) -> bytes:
        asked.append((url, allow_private_hosts))
        return _png(True)

    monkeypatch.setattr("clipdist.pictures.fetch", fetched)
    searcher = Searcher(embeddings, allow_private_hosts=allowed)
    hit = replace(searcher.find_image_from_id("7919", 1)[0], image_uri="http://10.0.0.1/a.png")
    Hits("q", (hit,))._repr_html_()
    searcher.find(Query.image("http://10.0.0.1/q.png"))
    assert asked == [("http://10.0.0.1/a.png", allowed), ("http://10.0.0.1/q.png", allowed)]


def test_paths_and_json_are_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    uris = ["/a  b/c.jpg", "file:///d.jpg", None, "/e\x1b]0;x\x07\x9b.jpg", "https://host/a.jpg"]
    hits = Hits("q", tuple(Hit(str(n), "\x9b31m", 0.5, uri) for n, uri in enumerate(uris)))
    find._print(find.SearchConfig(embeddings="e", format="paths"), hits)
    assert capsys.readouterr().out.splitlines() == ["/a  b/c.jpg", "/d.jpg", "/e]0;x.jpg", "https://host/a.jpg"]
    find._print(find.SearchConfig(embeddings="e", format="json"), hits)
    line = capsys.readouterr().out
    assert "\x9b" not in line
    assert "\x1b" not in line
    assert [hit["image_uri"] for hit in json.loads(line)["hits"]] == uris
    assert json.loads(line)["hits"][0]["description"] == "\x9b31m"


def search(*words: str) -> int:
    return cli.main(["search", *words])


def test_the_command(embeddings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(embeddings, "dress", "-", "0.5:shoe", "--top", "3", "--format", "json", "--text", "a + b") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    vector = StandIn().text("dress") - 0.5 * StandIn().text("shoe")
    assert [hit["id"] for hit in first["hits"]] == ids_of(vector, 3)
    assert (first["query"], second["query"]) == ("dress - 0.5:shoe", "a + b")
    assert [hit["id"] for hit in second["hits"]] == ids_of(StandIn().text("a + b"), 3)
    assert search(embeddings, "--id", "7919", "--format", "paths", "--top", "2", "--offset", "1") == 0
    expected = [f"/pictures/{int(row) * pow(7919, -1, 100_003) % 100_003}.jpg" for row in ids_of(STORED[1])[2:4]]
    assert capsys.readouterr().out.splitlines() == expected
    assert search(embeddings, "dress", "--html", str(tmp_path / "h.html"), "--sheet", str(tmp_path / "s.png")) == 0
    assert (tmp_path / "h.html").exists()
    assert (tmp_path / "s.png").exists()
    assert search(embeddings, "dress", "--offset", "3", "--top", "1") == 0
    assert capsys.readouterr().out.splitlines()[-2].split()[0] == "4"


def test_all_problems_at_once(embeddings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jpg").write_text("no picture")
    images = ["--image", str(tmp_path / "none.jpg"), "--image", str(tmp_path / "broken.jpg")]
    assert search(embeddings, *images) == 2
    told = capsys.readouterr().err
    assert "2 problems" in told
    assert "none.jpg: missing" in told
    assert "broken.jpg: not_an_image" in told
    for words, message in (
        ([], "give a query"),
        (["dress", "-", "dress"], "cancel"),
        (["--id", "nobody", "--id", "no one"], '"no one"'),
        (["--id", "no one", "--id", "nobody"], '"nobody"'),
        (["dress", "--top", "0"], "top"),
        (["dress", "--where", "prise < 3"], "price"),
        (["dress", "--html", str(tmp_path / "broken.jpg" / "x.html")], "cannot be written"),
    ):
        assert search(embeddings, *words) == 2, words
        told = capsys.readouterr().err
        assert message in told
        assert "Traceback" not in told


def test_the_gallery_opens_in_the_browser(
    embeddings: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(find.webbrowser, "open", lambda uri: opened.append(uri) or True)
    assert search(embeddings, "dress", "--open") == 0
    assert opened[0].startswith("file:///")
    assert "<html" in Path(opened[0].removeprefix("file://")).read_text()
    monkeypatch.setattr(find.webbrowser, "open", lambda uri: False)
    assert search(embeddings, "dress", "--open") == 0
    assert "no browser was found" in capsys.readouterr().err


def test_the_browser_that_the_environment_names(embeddings: str, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > "{tmp_path}/opened"\n')
    browser.chmod(0o755)
    command = [sys.executable, "-m", "clipdist.cli", "search", embeddings, "--id", "7919", "--open"]
    environment = {**os.environ, "BROWSER": f"{browser} %s", "TMPDIR": str(tmp_path)}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    uri = (tmp_path / "opened").read_text().strip()
    assert uri.startswith(f"file://{tmp_path}/clipdist-")
    assert "<html" in Path(uri.removeprefix("file://")).read_text()


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Sequence[str], lines: str) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert search(*words, "--interactive", "--format", "json") == 0
    said = capsys.readouterr()
    return [json.loads(line) for line in said.out.splitlines() if line.startswith("{")], said.err


def test_an_interactive_search(
    embeddings: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = ["dress", ":more", ":top 2", ":like 1", ":where price < 5", "dress - shoe", ":nonsense", "nobody - nobody"]
    lines += [":where prise < 5", ":like 9", f":html {tmp_path / 'h.html'}", ":for texts", "id:7919", ":quit", "never"]
    answers, told = talk(monkeypatch, capsys, [embeddings, "--top", "3"], "\n".join(lines))
    whole = ids_of(StandIn().text("dress"), 60)
    found = [[hit["id"] for hit in answer["hits"]] for answer in answers]
    assert found[0] == whole[:3]
    assert found[1] == whole[3:6]
    assert found[2] == whole[:2]
    row = int(whole[0]) * pow(7919, -1, 100_003) % 100_003
    assert found[3] == ids_of(STORED[row])[1:3]
    assert all(hit["price"] < 5 for answer in answers[4:6] for hit in answer["hits"])
    assert answers[-1]["query"] == "id:7919"
    assert len(answers) == 7
    for message in ("no such command", "cancel", "price", "no rank 9", "has no texts"):
        assert message in told
    assert (tmp_path / "h.html").exists()


def test_the_vector_of_a_searcher_is_what_the_index_is_asked(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(searcher.images, Index)
    assert isinstance(searcher.images.shards, Shards)
    vector = searcher.vector("dress")
    np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-6)
    assert searchers.open_picture(np.zeros((3, 5), np.uint8)).size == (5, 3)
