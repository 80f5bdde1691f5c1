"""Embeddings -> metrics, similarity heatmap, sheet of example queries, report.

What counts as right is printed with the numbers: the same pair, the same group (product), the same caption.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from clipdist import images, storage
from clipdist.config import Section, UserError, dump
from clipdist.gallery import Section as GallerySection
from clipdist.gallery import Tile, contact_sheet, gallery
from clipdist.images import BadImage
from clipdist.manifest import read_manifest, refuse_other_stamp
from clipdist.metrics import Relevance
from clipdist.pictures import read_picture
from clipdist.plots import heatmap
from clipdist.report import number, percent, table
from clipdist.retrieval import POSITIVES, Gallery, measure
from clipdist.schema import Stamp, recorded
from clipdist.shards import Shards

SHOWN = ("hit_rate@1", "hit_rate@5", "hit_rate@10", "recall@10", "mrr@10", "median_rank", "top1_accuracy")
OUTPUTS = ("config.yaml", "heatmap.png", "examples.png", "report.html")


class EvaluateConfig(Section):
    """Embeddings of pictures and captions -> metrics in both directions."""

    embeddings: str
    """What `embed` made, with images and texts."""
    output: str
    """Where metrics.json, report.html and the pictures go."""
    split: str | None = None
    """Only the rows of this split are gallery and queries; null: all."""
    heatmap_rows: int = Field(32, ge=2, le=48)
    """Pairs in the similarity heatmap."""
    example_queries: int = Field(12, ge=0, le=100)
    """Queries on the sheet of examples."""
    example_hits: int = Field(6, ge=1, le=20)
    """Pictures shown per query."""


@dataclass(frozen=True)
class Measured:
    """One split of an embeddings artefact in memory: L2-normalised float32 [rows, dim], rows in id order."""

    images: NDArray[np.float32]
    texts: NDArray[np.float32]
    image_rows: pa.Table
    text_rows: pa.Table
    gallery: Gallery


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measures and writes the report; a finished output is left alone. Returns metrics.json's content."""
    manifest = read_manifest(storage.absolute(config.embeddings), "embeddings")
    output = storage.absolute(config.output)
    identity = {
        "embeddings": manifest.stamp.identity,
        **config.model_dump(mode="json", exclude={"embeddings", "output"}),
    }
    if manifest.delete_files:  # the same model and input, but other rows to be found
        identity["delete_files"] = list(manifest.delete_files)
    stamp = Stamp("metrics", identity, recorded(embeddings=manifest.uri))
    path = storage.join(output, "metrics.json")
    if storage.exists(path):
        result: dict[str, Any] = json.loads(storage.read_bytes(path))
        refuse_other_stamp(output, stamp, Stamp.from_json(result["stamp"]))
        return result
    if strange := [name for name in storage.names(output) if name not in OUTPUTS]:
        raise UserError(f"{output}: this folder already holds {strange[0]}; choose an empty or new output")
    resolved = config.model_copy(update={"embeddings": manifest.uri, "output": output})
    measured = read_measured(config)
    relevance = measured.gallery.relevance()
    metrics = measure(measured.images, measured.texts, relevance)
    result = {"metrics": metrics, "positives": POSITIVES, "gallery": counts(measured, config.split)}
    storage.write_atomic(storage.join(output, "config.yaml"), dump(resolved).encode())
    _write_report(config, output, measured, relevance, result)
    result["stamp"] = stamp.to_json()
    storage.write_atomic(path, json.dumps(result, indent=1).encode())
    return result


def dry_run(config: EvaluateConfig) -> list[tuple[str, str]]:
    """Opens the embeddings and counts queries; measures nothing."""
    return list(counts(read_measured(config), config.split).items())


def derived(config: EvaluateConfig) -> list[tuple[str, str]]:
    return [("a hit", POSITIVES)]


def read_measured(config: EvaluateConfig) -> Measured:
    """The rows of the split. UserError when a tower or the split is missing."""
    manifest = read_manifest(storage.absolute(config.embeddings), "embeddings")
    if missing := [name for name in ("images", "texts") if not len(Shards(manifest, name))]:
        raise UserError(f"{config.embeddings}: has no {' and no '.join(missing)}; embed both towers to evaluate")
    found = {}
    for name, columns in {
        "images": ["id", "group", "split", "caption", "image_uri"],
        "texts": ["id", "pair_id", "split", "caption"],
    }.items():
        shards = Shards(manifest, name)
        rows, matrix = shards.columns(columns), shards.matrix()
        splits = sorted({str(split) for split in pc.unique(rows.column("split")).to_pylist()})
        keep = np.arange(len(rows))
        if config.split is not None:
            keep = np.flatnonzero(np.array(rows.column("split").to_pylist(), dtype=object) == config.split)
            if not len(keep):
                raise UserError(f"split: no row in {config.split} (splits: {', '.join(splits)})")
        ids = rows.column("id").take(pa.array(keep)).to_pylist()
        keep = keep[np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)]
        found[name] = (matrix[keep].astype(np.float32), rows.take(pa.array(keep)))
    return _joined(found["images"], found["texts"])


def _joined(found_images: tuple[Any, pa.Table], found_texts: tuple[Any, pa.Table]) -> Measured:
    """Captions whose picture was rejected have nothing to find, and are left out."""
    (image_vectors, image_rows), (text_vectors, text_rows) = found_images, found_texts
    row_of = {row_id: row for row, row_id in enumerate(image_rows.column("id").to_pylist())}
    pair_of_text = np.array([row_of.get(pair, -1) for pair in text_rows.column("pair_id").to_pylist()], np.int64)
    there = np.flatnonzero(pair_of_text >= 0)
    text_rows, text_vectors = text_rows.take(pa.array(there)), text_vectors[there]
    groups, captions = image_rows.column("group").to_pylist(), text_rows.column("caption").to_pylist()
    gallery_rows = Gallery(groups, captions, pair_of_text[there])
    return Measured(image_vectors, text_vectors, image_rows, text_rows, gallery_rows)


def counts(measured: Measured, split: str | None) -> dict[str, str]:
    return {
        "split": split or "all rows",
        "pictures": number(len(measured.images)),
        "captions": number(len(measured.texts)),
        "dimensions": str(measured.images.shape[1]),
    }


def metrics_rows(metrics: dict[str, float]) -> list[list[str]]:
    """A table row per direction."""
    rows = []
    for direction in ("text_to_image", "image_to_text"):
        values = [metrics[f"{direction}/{name}"] for name in SHOWN]
        rows.append(
            [
                direction.replace("_", " "),
                *(
                    f"{value:.4f}" if value < 1 or name != "median_rank" else f"{value:g}"
                    for name, value in zip(SHOWN, values, strict=True)
                ),
            ]
        )
    return rows


def summary(result: dict[str, Any]) -> str:
    """What a person sees at the end."""
    facts = ", ".join(
        f"{value} {name}" if name in ("pictures", "captions") else str(value)
        for name, value in result["gallery"].items()
        if name != "dimensions"
    )
    return "\n".join(
        [
            table(["", *SHOWN], metrics_rows(result["metrics"])),
            "",
            f"gallery: {facts}",
            f"{result['positives']} (hit_rate@k is the CLIP papers' R@k)",
        ]
    )


def _write_report(
    config: EvaluateConfig,
    output: str,
    measured: Measured,
    relevance: dict[str, Relevance],
    result: dict[str, Any],
) -> None:
    """Heatmap, sheet and HTML: made in a temporary folder, then put in place."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _heatmap(config, measured, folder / "heatmap.png")
        examples = example_hits(measured, relevance, config.example_queries, config.example_hits)
        contact_sheet(examples, folder / "examples.png", title="Example queries: found pictures, right ones framed")
        gallery(
            folder / "report.html",
            title="Retrieval on " + (config.split or "all rows"),
            intro=f"{result['positives']}. hit_rate@k is the CLIP papers' R@k.",
            facts={"text → image hit rate @10": percent(result["metrics"]["text_to_image/hit_rate@10"])} | {
                "image → text hit rate @10": percent(result["metrics"]["image_to_text/hit_rate@10"]),
                "pictures": result["gallery"]["pictures"], "captions": result["gallery"]["captions"],
            },
            tables=[(["", *SHOWN], metrics_rows(result["metrics"]))],
            figures=[("Similarity of captions (rows) and pictures (columns)", folder / "heatmap.png")],
            sections=[GallerySection(query, tiles) for query, tiles in examples],
        )  # fmt: skip
        for file in sorted(folder.iterdir()):
            storage.write_atomic(storage.join(output, file.name), file.read_bytes())


def _heatmap(config: EvaluateConfig, measured: Measured, path: Path) -> None:
    """Evenly drawn pairs with different captions: the diagonal should stand out."""
    _, first = np.unique(measured.text_rows.column("caption").to_pylist(), return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(config.heatmap_rows, len(first))).astype(int)]
    pictures = measured.gallery.pair_of_text[chosen]
    labels = [measured.gallery.captions[row] for row in chosen]
    matrix = measured.texts[chosen] @ measured.images[pictures].T
    heatmap(matrix, path, title="Cosine similarity, captions x pictures", row_labels=labels, column_labels=labels)


def example_hits(
    measured: Measured, relevance: dict[str, Relevance], queries: int, k: int
) -> list[tuple[str, list[Tile]]]:
    """Evenly drawn caption queries with their first k pictures, marked right or wrong."""
    right = relevance["text_to_image"]
    rows = np.linspace(0, len(measured.texts) - 1, min(queries, len(measured.texts))).astype(int)
    examples = []
    for row in rows:
        scores = measured.images @ measured.texts[row]
        best = np.argsort(-scores, kind="stable")[:k]
        positive = set(right.positives[right.offsets[row] : right.offsets[row + 1]].tolist())
        tiles = [_tile(measured.image_rows, int(found), float(scores[found]), int(found) in positive) for found in best]
        examples.append((measured.gallery.captions[row], tiles))
    return examples


def _tile(rows: pa.Table, row: int, score: float, right: bool) -> Tile:
    found = {name: rows.column(name)[row].as_py() for name in ("id", "caption", "image_uri")}
    try:
        picture = images.decode(read_picture(found["image_uri"]))
    except BadImage:
        picture = None
    return Tile(picture, found["caption"] or "", score, right, id=found["id"])
