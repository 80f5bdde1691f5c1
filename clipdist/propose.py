"""Words that may deserve a token of their own: frequent in the captions, broken into many pieces by the tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from clipdist import storage
from clipdist.config import UserError
from clipdist.manifest import Manifest
from clipdist.report import table
from clipdist.vocab import key, pieces, unknown_id

EDGES = ".,;:!?\"'`´“”‘’„()[]{}<>…*_/\\|-–—~"
"""What may stand around a word and does not belong to it; "+" and "#" may end one: "c++", "c#"."""


@dataclass(frozen=True)
class Proposal:
    """A word, how often it stands in the captions, and the pieces that it is broken into."""

    word: str
    count: int
    pieces: tuple[str, ...]
    saved: int
    """Tokens that all captions together would be shorter by; a piece that the tokenizer does not know counts too."""


def captions(manifest: Manifest) -> Iterator[str]:
    """All captions of the training pairs (of all pairs when none are for training), one row group in memory."""
    for file in manifest.select("pairs", "train") or manifest.select("pairs"):
        with storage.open_read(manifest.path(file)) as opened:
            parquet = pq.ParquetFile(opened)
            for group in range(parquet.num_row_groups):
                for texts in parquet.read_row_group(group, columns=["captions"]).column("captions").to_pylist():
                    yield from texts


def words(texts: Iterable[str]) -> Counter[str]:
    """How often each word with a letter stands in the texts, regardless of case."""
    counts: Counter[str] = Counter()
    for text in texts:
        bare = (part.lstrip(EDGES + "#").rstrip(EDGES) for part in key(text).split())
        counts.update(word.removesuffix("'s").removesuffix("’s") for word in bare)
    return Counter({word: count for word, count in counts.items() if any(letter.isalpha() for letter in word)})


def propose(counts: Counter[str], tokenizer: Any, known: Collection[str], min_count: int) -> list[Proposal]:
    """Words seen at least `min_count` times that are more than one token of open_clip's `tokenizer` and not `known`,
    those that save the most tokens first."""
    unknown, found, taken = unknown_id(tokenizer), [], {key(term) for term in known}
    for word, count in counts.items():
        ids = pieces(tokenizer, word) if count >= min_count and word not in taken else []
        saved = count * (len(ids) - 1 + (unknown in ids))
        if saved > 0:
            found.append(Proposal(word, count, _shown(tokenizer, ids), saved))
    return sorted(found, key=lambda one: (-one.saved, one.word))


def as_table(proposals: list[Proposal]) -> str:
    rows = [[one.word, f"{one.count:,}", " + ".join(one.pieces), f"{one.saved:,}"] for one in proposals]
    return table(["word", "count", "pieces", "tokens saved"], rows)


def write_terms(proposals: list[Proposal], path: str) -> None:
    """A file for `vocabulary.file`, one term per line. UserError when it cannot be written."""
    lines = [f"{one.word}  # {one.count} times, {len(one.pieces)} pieces\n" for one in proposals]
    try:
        Path(path).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror}") from None


def _shown(tokenizer: Any, ids: list[int]) -> tuple[str, ...]:
    """Pieces as text. One that is part of a letter's bytes shows as "�"."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        return tuple(tokenizer.decode([one]).strip() for one in ids)
    return tuple(str(inner.decode([one])).strip().removeprefix("##") for one in ids)
