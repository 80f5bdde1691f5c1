"""Raw inputs: every row of every kind comes once, in order, as what it was; what cannot be read is said."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipdist import sources, storage, tables
from clipdist.config import UserError
from clipdist.sources import Row, Source, SourceConfig, estimate_rows, open_source, refuse_inside


def opened(path: Path | str, **settings: Any) -> Source:
    return open_source(SourceConfig(path=str(path), **settings))


def rows_of(path: Path | str, **settings: Any) -> list[Row]:
    return list(opened(path, **settings).rows())


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(path, **settings)
    return str(caught.value)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_csv(tmp_path: Path) -> None:
    text = '\ufeffid,image,title\r\n007,a b.jpg,"two\nlines, ""quoted"""\r\n\r\n1, ü#.png ,NULL\r\n2,,\r\n3,/abs/x.jpg,5" tube\r\n'
    source = opened(write(tmp_path / "Products.CSV", text))
    assert (source.kind, source.columns) == ("csv", ("id", "image", "title"))
    assert list(source.rows()) == [
        {"id": "007", "image": "a b.jpg", "title": 'two\nlines, "quoted"', "image_uri": f"{tmp_path}/a b.jpg"},
        {"id": "1", "image": " ü#.png ", "title": "NULL", "image_uri": f"{tmp_path}/ü#.png"},
        {"id": "2", "image": "", "title": "", "image_uri": None},
        {"id": "3", "image": "/abs/x.jpg", "title": '5" tube', "image_uri": "/abs/x.jpg"},
    ]


def test_tsv(tmp_path: Path) -> None:
    found = rows_of(write(tmp_path / "t.tsv", "id\timage\ttitle\n1\ta.jpg\tred, round\n"))
    assert [(row["title"], row["image_uri"]) for row in found] == [("red, round", f"{tmp_path}/a.jpg")]


def test_ragged_csv_rows_are_told_and_the_others_stay(tmp_path: Path) -> None:
    found = rows_of(
        write(tmp_path / "t.csv", "id,image,title\n1,a.jpg\n2,b.jpg,fine\n3,c.jpg,too,many\n4,d.jpg,last\n")
    )
    assert [row["id"] for row in found if "\0malformed" not in row] == ["2", "4"]
    assert sorted(row["\0malformed"] for row in found if "\0malformed" in row) == [
        "expected 3 columns, got 2: '1,a.jpg'",
        "expected 3 columns, got 4: '3,c.jpg,too,many'",
    ]


def test_a_large_csv_keeps_its_order(tmp_path: Path) -> None:
    """Several blocks of the reader, with quoted line breaks and ragged rows on the way."""
    text = "a line\n" * 20  # so that nearly every line break, where blocks end, is inside a value
    lines = [f'{n},p/{n}.jpg,"{text}"' if n % 100 else f"{n},ragged" for n in range(30_000)]
    found = rows_of(write(tmp_path / "t.csv", "id,image,title\n" + "\n".join(lines)))
    assert [int(row["id"]) for row in found if "id" in row] == [n for n in range(30_000) if n % 100]
    assert sum("\0malformed" in row for row in found) == 300


def test_a_csv_without_rows(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "a.csv", "id,image,title\n")) == []
    assert rows_of(write(tmp_path / "b.csv", "id,image,title")) == []
    assert "the first line must name the columns" in refused(write(tmp_path / "c.csv", ""))
    assert "the first line must name the columns, each once" in refused(write(tmp_path / "d.csv", "id,id,image\n"))


@pytest.mark.parametrize("rest", ["\n", "", '\n4,d.jpg,"closed"\n5,e.jpg,"open again\n'])
def test_a_quote_that_is_never_closed_would_swallow_rows(tmp_path: Path, rest: str) -> None:
    path = write(tmp_path / "t.csv", f'id,image,title\n1,a.jpg,"never closed\n2,b.jpg,x\n3,c.jpg,y{rest}')
    assert 'a quote (") is never closed' in refused(path)


@pytest.mark.parametrize("encoding", ["cp949", "utf-16"])
def test_a_csv_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    assert "cannot be read as" in refused(write(tmp_path / "t.csv", "id,image,title\n1,a.jpg,신발\n".encode(encoding)))


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        b"not json", b'{"id": 7, "image": "a.jpg", "tags": ["x", "y"]}', b"", b"[1]",
        b'{"id": "7", "image": null, "price": 1.5}', b'{"image": "\xff"}', b'{"id": true, "image": 5}',
    ]  # fmt: skip
    path = write(tmp_path / "t.jsonl", b"\xef\xbb\xbf" + b"\n".join(lines))
    source = opened(path)
    assert (source.kind, set(source.columns)) == ("jsonl", {"id", "image", "tags", "price"})
    found = list(source.rows())
    assert [row.get("id") for row in found] == [None, 7, None, "7", None, True]
    assert found[1] == {"id": 7, "image": "a.jpg", "tags": ["x", "y"], "image_uri": f"{tmp_path}/a.jpg"}
    assert found[3]["image_uri"] is None
    assert [row["\0malformed"].split(":")[1] for row in found if "\0malformed" in row] == ["1", "4", "6"]


@pytest.mark.parametrize("text", ["", "[\n", '[{"id": 1}]', "null\n", "7\n"])
def test_what_is_no_jsonl(tmp_path: Path, text: str) -> None:
    assert "expected one JSON object per line" in refused(write(tmp_path / "t.jsonl", text))


def test_parquet_with_paths(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "image": ["a.jpg", None], "tags": [["x"], []]}), tmp_path / "t.parquet")
    assert rows_of(tmp_path / "t.parquet") == [
        {"id": 1, "image": "a.jpg", "tags": ["x"], "image_uri": f"{tmp_path}/a.jpg"},
        {"id": 2, "image": None, "tags": [], "image_uri": None},
    ]


@pytest.mark.parametrize(
    ("column", "leaf"),
    [
        (pa.array([b"1", b"2", b"3"]), "picture"),
        (pa.array([b"1", b"2", b"3"], pa.large_binary()), "picture"),
        (pa.array([{"bytes": b"1", "path": "p"}] * 3), "picture.bytes"),
    ],
)
def test_parquet_with_pictures(tmp_path: Path, column: pa.Array, leaf: str) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a", "b", "c"], "picture": column}), path, row_group_size=2)
    assert rows_of(path, image_column="picture") == [
        {"id": "a", "image_uri": f"{path}#row=0:0:{leaf}"},
        {"id": "b", "image_uri": f"{path}#row=0:1:{leaf}"},
        {"id": "c", "image_uri": f"{path}#row=1:0:{leaf}"},
    ]


def test_an_empty_row_group_of_pictures_is_counted(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "image": [b"x"]})
    with pq.ParquetWriter(tmp_path / "t.parquet", table.schema) as writer:
        for rows in (table, table.slice(1), table):
            writer.write_table(rows)
    found = [row["image_uri"] for row in rows_of(tmp_path / "t.parquet")]
    assert found == [
        f"{tmp_path}/t.parquet#row={group}:0:image"
        for group in (0, pq.read_metadata(tmp_path / "t.parquet").num_row_groups - 1)
    ]


def test_what_is_no_parquet(tmp_path: Path) -> None:
    assert "cannot be read as parquet" in refused(write(tmp_path / "t.parquet", "PAR1"))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a.jpg", "/shop/a.jpg"),
        ("/x/a.jpg", "/x/a.jpg"),
        ("file:///x/a.jpg", "/x/a.jpg"),
        ("https://host/a b.jpg?c#d", "https://host/a b.jpg?c#d"),
        ("s3://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("한글 #1.jpg", "/shop/한글 #1.jpg"),
        ("  ", None),
    ],
)
def test_where_a_picture_is(tmp_path: Path, given: str, found: str | None) -> None:
    path = write(tmp_path / "t.jsonl", json.dumps({"image": given}))
    assert rows_of(path, image_root="/shop")[0]["image_uri"] == found


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_and_a_glob_of_tables(tmp_path: Path) -> None:
    for name in ("b/2.csv", "a/1.csv", "a/10.csv", "3.csv"):
        write(tmp_path / name, f"id,image\n{name},x.jpg\n")
    write(tmp_path / "a" / "0-empty.csv", "")
    write(tmp_path / "notes.md", "no table")
    found = rows_of(tmp_path)
    assert [row["id"] for row in found] == ["3.csv", "a/1.csv", "a/10.csv", "b/2.csv"]
    assert [row["image_uri"] for row in found[:2]] == [f"{tmp_path}/x.jpg", f"{tmp_path}/a/x.jpg"]
    assert [row["id"] for row in rows_of(f"{tmp_path}/a/*.csv")] == ["a/1.csv", "a/10.csv"]
    assert [row["id"] for row in rows_of(f"{tmp_path}/*/*.csv")] == ["a/1.csv", "a/10.csv", "b/2.csv"]


def test_tables_of_a_folder_have_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path / "1.csv", "id,image,group\na,a.jpg,g\n")
    write(tmp_path / "2.csv", "id,image,product\nb,b.jpg,g\n")
    assert refused(tmp_path) == f"source.path: {tmp_path}/2.csv has no column group, as {tmp_path}/1.csv has"
    folder = tmp_path / "parquet"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1], "image": ["a"]}), folder / "1.parquet")
    pq.write_table(pa.table({"id": [1], "picture": ["a"]}), folder / "2.parquet")
    assert "2.parquet has no column image" in refused(folder)


def test_pictures_with_captions_beside_them(tmp_path: Path) -> None:
    for name in ("a.jpg", "b c#.PNG", "sub/a.jpg", "v.2.webp", "한글.jpeg"):
        write(tmp_path / name, b"x")
    write(tmp_path / "a.txt", " a red shoe \n")
    write(tmp_path / "v.2.txt", "신발")
    source = opened(tmp_path)
    assert (source.kind, source.columns) == ("folder", ("id", "text"))
    found = [(row["id"], row["text"], row["image_uri"]) for row in source.rows()]
    assert found == [
        ("a", "a red shoe", f"{tmp_path}/a.jpg"),
        ("b c#", "", f"{tmp_path}/b c#.PNG"),
        ("v.2", "신발", f"{tmp_path}/v.2.webp"),
        ("한글", "", f"{tmp_path}/한글.jpeg"),
        ("sub/a", "", f"{tmp_path}/sub/a.jpg"),
    ]
    assert [row["id"] for row in rows_of(f"{tmp_path}/*.jpg")] == ["a"]
    assert [row["id"] for row in rows_of(f"{tmp_path}/*/*.jpg", kind="folder")] == ["sub/a"]
    assert [row["id"] for row in rows_of(tmp_path / "a.jpg")] == ["a"]


def test_class_folders(tmp_path: Path) -> None:
    for name in ("red_shoe/1.jpg", "red_shoe/2.jpg", "hat/summer/1.jpg"):
        write(tmp_path / name, b"x")
    expected = [("hat/summer/1", "hat"), ("red_shoe/1", "red shoe"), ("red_shoe/2", "red shoe")]
    assert opened(tmp_path).kind == "class_folders"
    assert [(row["id"], row["label"]) for row in rows_of(tmp_path)] == expected
    assert [(row["id"], row["label"]) for row in rows_of(f"{tmp_path}/red*/*.jpg")] == expected[1:]
    write(tmp_path / "3.jpg", b"x")
    assert opened(tmp_path).kind == "folder", "a picture beside the folders has no class"


def test_an_empty_folder_is_not_called_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an empty folder"):
        opened(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        opened(tmp_path / "none")


def test_what_is_not_clear_is_asked(tmp_path: Path) -> None:
    write(tmp_path / "both" / "a.csv", "id,image\n1,a.jpg\n")
    write(tmp_path / "both" / "a.jsonl", '{"image": "a.jpg"}\n')
    assert refused(tmp_path / "both") == (
        f"source.kind: {tmp_path}/both holds csv and jsonl files; say which kind to read"
    )
    assert len(rows_of(tmp_path / "both", kind="jsonl")) == 1
    assert "no such file or folder" in refused(tmp_path / "missing")
    assert "no such file or folder" in refused(f"{tmp_path}/*.csv")
    write(tmp_path / "docs" / "readme.md", "")
    assert "neither a table, nor pictures, nor tars are there" in refused(tmp_path / "docs")
    assert "holds no .csv or .tsv file" in refused(tmp_path / "docs", kind="csv")


def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    assert len(rows_of(tmp_path)) == 1  # planning makes a reject of it


# --- WebDataset ------------------------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def picture_in(uri: str) -> bytes:
    path, _, place = uri.partition("#bytes=")
    offset, size = map(int, place.split("+"))
    return storage.read_bytes(path, offset, offset + size)


def test_webdataset(tmp_path: Path) -> None:
    long_name = "d/" + "x" * 150
    path = write_tar(
        tmp_path / "t.tar",
        {
            "d/001.jpg": b"jpg 1", "d/001.txt": b" a shoe ", "d/001.json": b'{"price": 3, "id": 9, "tags": ["x"]}',
            "002.cls": b"3", "002.PNG": b"png 2", "002.TXT": "신발".encode(), "002.bin": b"?",
            "003.txt": b"no picture",
            f"{long_name}.webp": b"webp",
        },
    )  # fmt: skip
    source = opened(path)
    assert source.kind == "webdataset"
    found = list(source.rows())
    assert [row["id"] for row in found] == ["d/001", "002", "003", long_name]
    assert [row["image_uri"] and picture_in(row["image_uri"]) for row in found] == [b"jpg 1", b"png 2", None, b"webp"]
    assert [row.get("text") for row in found] == ["a shoe", "신발", "no picture", None]
    assert (found[0]["price"], found[0]["tags"], found[1]["label"]) == (3, ["x"], "3")


def test_several_captions_in_a_tar_all_count(tmp_path: Path) -> None:
    members = {
        "1.jpg": b"x",
        "1.txt": b"one",
        "1.caption": b"two",
        "1.json": b'{"text": "three", "caption_en": "four"}',
    }
    (row,) = rows_of(write_tar(tmp_path / "t.tar", members))
    assert (row["text"], row["caption_en"]) == (["one", "two", "three"], "four")
    members = {"1.json": b'{"text": "same"}', "1.txt": b"same", "1.jpg": b"x"}
    assert rows_of(write_tar(tmp_path / "t.tar", members))[0]["text"] == "same"


@pytest.mark.parametrize("order", [("1.jpg", "1.mask.png"), ("1.mask.png", "1.jpg")])
def test_a_mask_is_not_the_picture(tmp_path: Path, order: tuple[str, str]) -> None:
    (row,) = rows_of(write_tar(tmp_path / "t.tar", {name: name.encode() for name in order}))
    assert picture_in(row["image_uri"]) == b"1.jpg"


def test_a_json_member_that_cannot_be_read_spoils_its_row_only(tmp_path: Path) -> None:
    members = {"1.jpg": b"x", "1.json": b'{"text": ', "2.jpg": b"y", "2.json": b"[1]", "2.txt": b"fine"}
    found = rows_of(write_tar(tmp_path / "t.tar", members))
    assert "1.json: not valid JSON" in found[0]["\0malformed"]
    assert "\0malformed" not in found[1]


@pytest.mark.parametrize("fault", ["cut in a picture", "cut in a header", "damaged header", "no tar"])
def test_a_damaged_tar_does_not_end_early_in_silence(tmp_path: Path, fault: str) -> None:
    path = write_tar(tmp_path / "t.tar", {f"{n}.jpg": bytes([n]) * 2000 for n in range(1, 9)})
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[5].offset
    if fault == "cut in a picture":
        del data[start + 900 :]
    elif fault == "cut in a header":
        del data[start + 100 :]
    elif fault == "damaged header":
        data[start : start + 200] = b"\x01" * 200
    else:
        data[:] = b"no tar at all" * 100
    assert "cannot be read as tar" in refused(write(path, bytes(data)))


# --- fingerprints, S3 ------------------------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_the_input(tmp_path: Path) -> None:
    def mark() -> str:
        return json.dumps(opened(tmp_path).fingerprint())

    write(tmp_path / "a.jpg", b"x")
    write(tmp_path / "a.txt", "one")
    seen = [mark()]
    assert mark() == seen[0]
    for name, data in (("a.jpg", b"y"), ("a.txt", b"two"), ("b.jpg", b"x"), ("b.txt", b"new")):
        write(tmp_path / name, data)
        seen.append(mark())
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    seen.append(mark())
    assert len(set(seen)) == len(seen)


def test_the_fingerprint_has_the_sizes_of_all_files(tmp_path: Path) -> None:
    for number in range(1002):
        write(tmp_path / f"{number:04d}.jpg", b"x")
    before = opened(tmp_path).fingerprint()
    write(tmp_path / "1001.jpg", b"longer")
    after = opened(tmp_path).fingerprint()
    assert (before["content"], before["listing"] == after["listing"]) == (after["content"], False)


def test_inputs_on_s3(bucket: str, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"1.jpg": b"in the tar", "1.txt": b"one"})
    pq.write_table(pa.table({"id": ["p"], "image": [b"x"]}), tmp_path / "t.parquet")
    for name, data in {
        "csv/t.csv": b"id,image\n007,sub/a b#.jpg\n",
        "folder/x 1.jpg": b"x",
        "folder/x 1.txt": b"a caption",
        "classes/hat/1.jpg": b"x",
        "tars/00.tar": tar.read_bytes(),
        "parquet/t.parquet": (tmp_path / "t.parquet").read_bytes(),
    }.items():
        storage.write_atomic(f"{bucket}/{name}", data)
    (row,) = rows_of(f"{bucket}/csv")
    assert (row["id"], row["image_uri"]) == ("007", f"{bucket}/csv/sub/a b#.jpg")
    (row,) = rows_of(f"{bucket}/folder/")
    assert (row["id"], row["text"], row["image_uri"]) == ("x 1", "a caption", f"{bucket}/folder/x 1.jpg")
    (row,) = rows_of(f"{bucket}/classes")
    assert (row["id"], row["label"]) == ("hat/1", "hat")
    (row,) = rows_of(f"{bucket}/tars/*.tar")
    assert picture_in(row["image_uri"]) == b"in the tar"
    (row,) = rows_of(f"{bucket}/parquet/t.parquet")
    assert row["image_uri"] == f"{bucket}/parquet/t.parquet#row=0:0:image"
    assert len(opened(f"{bucket}/folder").fingerprint()["content"]) == 2
    assert "no such file or folder" in refused(f"{bucket}/nothing")


# --- what is read ----------------------------------------------------------------------------------------------------


def test_only_wanted_columns_are_read(tmp_path: Path) -> None:
    rows = {"id": ["1"], "image": ["a.jpg"], "title": ["t"], "last": ["l"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    write(tmp_path / "t.csv", "id,image,title,last\n1,a.jpg,t,l\n")
    for name, extra in (("t.parquet", set[str]()), ("t.csv", {"last"})):
        source = opened(tmp_path / name)
        (batch,) = source.batches({"id"})
        assert set(batch.schema.names) == {"id"} | extra
        (batch,) = source.batches({"title", "image_uri"})
        assert set(batch.schema.names) == {"title", "image", "image_uri"} | extra


def test_where_pictures_are_by_the_column() -> None:
    values = [
        "",
        " ",
        None,
        "a.jpg",
        " /a b.jpg\u00a0",
        "file:///x",
        "file://y",
        "a/file://z",
        "s3://b/k",
        "한글.jpg",
        "x:/y",
    ]
    for kind in (pa.string(), pa.large_string()):
        for folder in ("/shop", "s3://bucket/x/", ""):
            expected = [tables.image_uri(value, folder) for value in values]
            assert tables.image_uris(pa.array(values, kind), folder).to_pylist() == expected
    for odd in (pa.array([1, None]), pa.array([1.5, float("nan")]), pa.array([["a"], None]), pa.nulls(2)):
        expected = [tables.image_uri(value, "/shop") for value in odd.to_pylist()]
        assert tables.image_uris(odd, "/shop").to_pylist() == expected


def test_lines_of_jsonl_are_not_read_into_each_other(tmp_path: Path) -> None:
    """Lines that together would be valid JSON, as many objects as lines, but are not so by themselves."""
    lines = [
        '{"image": "a", "list": [{"x": 1}',
        '{"y": 2}]}',
        '{"image": "b"},{"image": "c"}',
        '{"image": "d"',
        '"z": 1}',
        '{"image": "e"}',
    ]
    found = rows_of(write(tmp_path / "t.jsonl", "\n".join(lines)))
    assert [row.get("image") for row in found] == [None] * 5 + ["e"]
    assert [row["\0malformed"].split(":")[1] for row in found[:5]] == ["1", "2", "3", "4", "5"]


def test_a_number_too_long_for_python_is_a_malformed_row(tmp_path: Path) -> None:
    found = rows_of(write(tmp_path / "t.jsonl", '{"image": "a"}\n{"image": ' + "9" * 5000 + "}\n"))
    assert "not valid JSON" in found[1]["\0malformed"]


def test_parquet_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["id", "image", "id"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert "must name the columns, each once" in refused(tmp_path / "t.parquet")


@pytest.mark.parametrize("place", ["", "/*.jpg", "/*/*.jpg", "/a.jpg"])
def test_only_captions_that_are_there_and_wanted_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "sub/a.jpg", "sub/b.jpg"):
        write(tmp_path / name, b"x")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "sub/b.txt", "two")
    source = opened(f"{tmp_path}{place}", kind="folder")
    requests: list[str] = []

    def seen(path: str, *_: object) -> bytes:
        requests.append(path)
        return Path(path).read_bytes()

    for name in ("read_bytes", "exists", "size", "open_read"):
        monkeypatch.setattr(storage, name, seen)
    assert all("text" not in row for batch in source.batches({"id", "image_uri"}) for row in batch)
    assert requests == []
    texts = {row["id"]: row["text"] for row in source.rows()}
    expected = {"a": "one", "b": "", "c": "", "sub/a": "", "sub/b": "two"}
    assert texts == {name: expected[name] for name in texts}
    assert sorted(requests) == [f"{tmp_path}/{name}.txt" for name in sorted(texts) if expected[name]]


def test_the_fingerprint_has_the_captions_where_they_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", b"x")
    write(tmp_path / "a.txt", "one")
    before = [opened(tmp_path).fingerprint(wanted) for wanted in (None, {"text"}, {"id"})]
    write(tmp_path / "a.txt", "two")
    after = [opened(tmp_path).fingerprint(wanted) for wanted in (None, {"text"}, {"id"})]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]


def test_deep_folders_with_captions_on_s3_are_no_classes(bucket: str) -> None:
    for name in ("deep/a/1.jpg", "deep/a/1.txt"):
        storage.write_atomic(f"{bucket}/{name}", b"x")
    assert opened(f"{bucket}/deep").kind == "folder"


def test_jsonl_on_s3(bucket: str) -> None:
    lines = [json.dumps({"id": n, "image": f"{n}.jpg"}) for n in range(1000)]
    storage.write_atomic(f"{bucket}/lines/t.jsonl", "\n".join(lines).encode())
    found = rows_of(f"{bucket}/lines")
    assert [row["id"] for row in found] == list(range(1000))
    assert found[-1]["image_uri"] == f"{bucket}/lines/999.jpg"


# --- how many rows there are -----------------------------------------------------------------------------------------


def test_small_inputs_folders_and_footers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "t.csv", 'id,image\n1,"a\nb"\n2,b\n3,c,ragged\n')
    assert estimate_rows(opened(tmp_path / "t.csv")) == (3, True)
    write(tmp_path / "empty.csv", "id,image\n")
    assert estimate_rows(opened(tmp_path / "empty.csv")) == (0, True)
    write(tmp_path / "t.jsonl", '{"image": 1}\n\nbad\n')
    assert estimate_rows(opened(tmp_path / "t.jsonl")) == (2, True)
    tar = write_tar(tmp_path / "t.tar", {"1.jpg": b"x", "1.txt": b"t", "2.jpg": b"x"})
    assert estimate_rows(opened(tar)) == (2, True)
    write(tmp_path / "folder/a.jpg", b"x")
    assert estimate_rows(opened(tmp_path / "folder")) == (1, True)
    for n in range(6):
        rows = [str(number) for number in range(100 + n)]
        (tmp_path / "parquet").mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": rows, "image": rows}), tmp_path / "parquet" / f"{n}.parquet")
    assert estimate_rows(opened(tmp_path / "parquet")) == (615, True)
    monkeypatch.setattr(sources, "FOOTERS", 3)
    rows, exact = estimate_rows(opened(tmp_path / "parquet"))
    assert (590 < rows < 640, exact) == (True, False)


def test_large_inputs_are_estimated_from_their_first_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "COUNTED_BYTES", 10_000)
    read: list[int] = []
    real = storage.read_bytes

    def counted(path: str, start: int | None = None, end: int | None = None) -> bytes:
        data = real(path, start, end)
        read.append(len(data))
        return data

    monkeypatch.setattr(storage, "read_bytes", counted)
    lines = [f'{n:05d},"a picture\nwith, a line break",{"x" * (n % 50)}' for n in range(5000)]
    for n in range(6):
        write(tmp_path / "csv" / f"{n}.csv", "id,image,title\n" + "\n".join(lines))
        write(tmp_path / "jsonl" / f"{n}.jsonl", "\n".join(json.dumps({"image": line}) for line in lines))
        members = {f"{k:03d}.{kind}": b"x" * 3000 for k in range(300) for kind in ("jpg", "txt")}
        write_tar(write(tmp_path / "tar" / f"{n}.tar", b""), members)
    for name, expected in (("csv", 30_000), ("jsonl", 30_000), ("tar", 1800)):
        rows, exact = estimate_rows(opened(tmp_path / name))
        assert not exact
        assert abs(rows - expected) < 0.05 * expected, name
    assert sum(read) <= 80_000
    write(tmp_path / "long.jsonl", json.dumps({"image": "x" * 50_000}) + "\n")
    assert estimate_rows(opened(tmp_path / "long.jsonl")) == (5, False), "of one line no end was seen"


@pytest.mark.parametrize(
    ("path", "output", "inside"),
    [
        ("raw", "raw", True),
        ("raw", "raw/emb", True),
        ("raw/", "raw/a/emb", True),
        ("raw", "raw2", False),
        ("raw/t.csv", "raw/emb", False),
        ("raw/*.parquet", "raw/emb", False),
        ("raw/**/*.jpg", "raw/emb", True),
        ("s3://bucket/raw", "s3://bucket/raw/emb", True),
        ("s3://bucket/raw", "s3://bucket/emb", False),
    ],
)
def test_an_output_inside_the_input_is_refused(path: str, output: str, inside: bool) -> None:
    config = SourceConfig(path=path)
    if inside:
        with pytest.raises(UserError, match="lies in source.path"):
            refuse_inside(config, output)
    else:
        refuse_inside(config, output)
