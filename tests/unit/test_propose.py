"""Terms are proposed out of captions: counted through the manifest, by what they would save, into a file that trains."""

from collections import Counter
from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import propose
from clipdist.cli import main
from clipdist.ledger import begin
from clipdist.manifest import File, Manifest, read_manifest
from clipdist.schema import Stamp, pairs_schema
from clipdist.vocab import VocabularyConfig
from tests.unit import zoo

CAPTIONS = {
    "train": [["a Jacquardette coat", "jacquardette, red"], ["“jacquardette”"], ["a red kurtas", "kurtas C++"]],
    "validation": [["secretword " * 50]],
}


@pytest.fixture
def pairs(tmp_path: Path) -> Manifest:
    """Pairs with two splits, each row its own row group."""
    stamp = Stamp("pairs", {})
    ledger = begin(str(tmp_path / "pairs"), stamp, lambda: [pa.table({"id": ["x"] * 4})])
    tables = {}
    for split, rows in CAPTIONS.items():
        table = pa.Table.from_pylist(
            [{"id": f"{split}{n}", "image": b"", "captions": row, "split": split} for n, row in enumerate(rows)],
            pairs_schema([]),
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=1)
        data = sink.getvalue().to_pybytes()
        tables["pairs", split] = (data, File("", "pairs", len(rows), (1,) * len(rows), len(data), split))
    ledger.commit(0, tables, {"pairs": 4}, [])
    ledger.publish()
    return read_manifest(str(tmp_path / "pairs"), "pairs")


def test_captions_of_training_are_read_row_group_by_row_group(pairs: Manifest) -> None:
    assert list(propose.captions(pairs)) == [text for row in CAPTIONS["train"] for text in row]


def test_words_have_no_marks_around_them_and_no_case() -> None:
    texts = ["The C++ book, “Gore-Tex” (v-neck)!", "women's 3.5 mm #fashion c#", "gore-tex; the... 2024"]
    assert propose.words(texts) == Counter(
        {"the": 2, "gore-tex": 2, "c++": 1, "book": 1, "v-neck": 1, "women": 1, "mm": 1, "fashion": 1, "c#": 1}
    )


def test_words_that_save_most_come_first() -> None:
    counts = Counter({"dress": 900, "kurtas": 30, "jacquardette": 20, "benetton": 4, "known": 1, "fairisle": 100})
    found = propose.propose(counts, open_clip.get_tokenizer("ViT-B-32"), ("Fairisle",), min_count=5)
    assert [one.word for one in found] == ["jacquardette", "kurtas"]
    assert found[1].pieces == ("kur", "tas")
    assert [one.saved for one in found] == [20 * (len(found[0].pieces) - 1), 30]
    assert "".join(found[0].pieces) == "jacquardette"


def test_hugging_face_pieces_and_unknown_words(tmp_path: Path) -> None:
    tokenizer = zoo.build("hugging_face", tmp_path).tokenizer
    found = propose.propose(Counter({"jacket": 3, "coat": 9, "고프코어룩": 5}), tokenizer, (), 1)
    assert [(one.word, one.pieces, one.saved) for one in found] == [
        ("고프코어룩", ("[UNK]",), 5),
        ("jacket", ("jack", "et"), 3),
    ]


def test_the_command_prints_a_table_and_writes_a_file_that_trains(
    pairs: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "terms.txt"
    assert main(["vocab", pairs.uri, "--min-count", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "kur + tas" in shown
    assert "secretword" not in shown, "validation captions are for validation"
    assert VocabularyConfig(file=str(out)).all_terms() == ("jacquardette", "kurtas")
    assert "# 3 times" in out.read_text()
    assert main(["vocab", pairs.uri, "--min-count", "2", "--top", "1"]) == 0
    shown = capsys.readouterr().out
    assert "kurtas" not in shown
    assert "the first 1" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["PAIRS", "--model", "ViT-B-23"], "did you mean"),
        (["PAIRS", "--top", "0"], "--top"),
        (["PAIRS", "--out", "/proc/no/terms.txt"], "--out /proc/no/terms.txt: cannot be written"),
    ],
)
def test_mistakes_are_told(
    pairs: Manifest, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vocab", *(pairs.uri if one == "PAIRS" else one for one in arguments)]) == 2
    assert message in capsys.readouterr().err
