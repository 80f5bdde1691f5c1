"""Files shared out among readers: every row is with one of them, under its number in the whole table."""

import numpy as np
import pytest

from clipdist.manifest import File
from clipdist.remove import remove
from clipdist.search import Index
from clipdist.shards import Shards
from clipdist.shares import Share, places, spread
from tests.unit.some_shards import some_vectors, write_embeddings

SIZES = (40, 3, 60, 1, 25, 30)


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6, 50])
def test_every_row_is_with_one_reader_under_its_number(tmp_path_factory: pytest.TempPathFactory, readers: int) -> None:
    uri = str(tmp_path_factory.mktemp("table"))
    write_embeddings(uri, [some_vectors(rows, 8, rows) for rows in SIZES])
    remove(uri, [str(row * 7919 % 100_003) for row in (0, 39, 40, 41, 42, 60, 103, 110, 158)])
    whole = Index.open(uri)
    manifest = whole.shards.manifest
    first, rows = places(whole.shards)
    shares = spread(manifest.select("images"), rows, readers)
    assert len(shares) == min(readers, len(SIZES))
    seen: list[int] = []
    for files in shares:
        share = Share(manifest.part(files), "images", first)
        assert len(share.index) == sum(rows[file.path] for file in files)
        found = share.search(np.ones(8), len(whole), None).rows[0]
        seen += found.tolist()
        np.testing.assert_array_equal(share.vectors(found), whole.shards.vectors(found))
        assert share.take(found, None).to_pylist() == whole.describe(found)
        for row in share.take(found, ["id"]).column("id").to_pylist()[:3]:
            number = share.row_of_id(row)
            assert number is not None
            assert whole.describe(np.array([number]))[0]["id"] == row
    assert sorted(seen) == list(range(len(whole)))


def test_readers_get_about_as_many_rows() -> None:
    files = [File(str(number), "images", 0, (), 0) for number in range(40)]
    rows = {str(number): 131_072 if number % 5 else 10 + number for number in range(40)}
    shares = spread(files, rows, 6)
    loads = [sum(rows[file.path] for file in share) for share in shares]
    assert max(loads) - min(loads) <= 131_072
    assert [[int(file.path) for file in share] for share in shares] == [
        sorted(int(file.path) for file in share) for share in shares
    ], "in the table's order"
    assert spread([], {}, 4) == [[]]
    assert all(spread(files[:1] * 1, {"0": 0}, 3))


def test_deletes_of_other_files_are_only_let_pass_for_a_part(tmp_path_factory: pytest.TempPathFactory) -> None:
    uri = str(tmp_path_factory.mktemp("table"))
    write_embeddings(uri, [some_vectors(5, 8, 0), some_vectors(5, 8, 1)])
    remove(uri, ["0"])
    manifest = Index.open(uri).shards.manifest
    assert len(Shards(manifest.part(manifest.files[1:]), "images")) == 5
    assert len(Shards(manifest.part(manifest.files[:1]), "images")) == 4
    assert "is_part" not in manifest.to_json()
