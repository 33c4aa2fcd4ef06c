from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from opensora.datasets import catalogue as catalogue_module
from opensora.datasets.catalogue import load_catalogue
from opensora.errors import ConfigError, DataError, ObjectNotFoundError
from opensora.storage import Storage

HEADER = "path,text,num_frames,height,width,fps"


def csv(folder: Path, *rows: str, header: str = HEADER, name: str = "clips.csv") -> str:
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def parquet(folder: Path, **columns: Any) -> str:
    path = folder / "clips.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    return str(path)


def test_a_csv_file_is_read_with_its_columns(tmp_path: Path) -> None:
    uri = csv(tmp_path, 'a.mp4,"a cat, asleep\non a mat",60,240,426,29.97', "b.PNG,a dog,1,512,512,")
    catalogue = load_catalogue(uri)
    assert len(catalogue) == 2
    assert catalogue.row_text(0) == "a cat, asleep\non a mat"
    assert catalogue.row_path(1) == str(tmp_path / "b.PNG")
    assert catalogue.num_frames.tolist() == [60, 1]
    assert (catalogue.height.tolist(), catalogue.width.tolist()) == ([240, 512], [426, 512])
    assert catalogue.fps[0] == pytest.approx(29.97)
    assert math.isnan(catalogue.fps[1])
    assert catalogue.ids.tolist() == [0, 1]
    assert (catalogue.dropped, catalogue.num_empty_texts, catalogue.num_duplicates) == ({}, 0, 0)


def test_captions_of_several_lines_may_lie_anywhere_in_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue_module, "_CSV_BLOCK_BYTES", 128)
    uri = csv(tmp_path, *[f'{i}.mp4,"line\nof {i}\n\nmore",60,240,426,24' for i in range(100)])
    catalogue = load_catalogue(uri)
    assert [catalogue.row_text(i) for i in range(100)] == [f"line\nof {i}\n\nmore" for i in range(100)]


def test_parquet_and_csv_files_of_the_same_rows_are_read_alike(tmp_path: Path) -> None:
    columns = {
        "path": ["a.mp4", "b.txt", "c.mp4", "d.mp4", None, "f.mp4"],
        "text": ["one", "two", None, "four", "five", "NA"],
        "num_frames": [60.0, 60.0, None, 70.0, 60.0, 80.0],
        "height": [240, 240, 240, 240, 240, 0],
        "width": ["426", "426", "426", "426", "426", "426"],
        "aes": [1, 2, 3, 4, 5, 6],
    }
    first = load_catalogue(parquet(tmp_path, **columns))
    pa.csv.write_csv(pa.table(columns), tmp_path / "clips.csv")
    second = load_catalogue(str(tmp_path / "clips.csv"))
    for catalogue in (first, second):
        assert catalogue.ids.tolist() == [0, 3]
        assert catalogue.num_frames.tolist() == [60, 70]
        assert catalogue.width.tolist() == [426, 426]
        assert [catalogue.row_text(i) for i in range(2)] == ["one", "four"]
        assert catalogue.dropped == {
            "an empty path": 1,
            "an unknown file extension": 1,
            "num_frames missing or not a number": 1,
            "height zero or negative": 1,
        }


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_other_text_types_of_parquet_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    path = pa.array(["a.mp4", "b.mp4", None], pa.string()).cast(kind)
    sizes = {name: pa.array([60, 60, 60], pa.int16()) for name in ("num_frames", "height", "width")}
    catalogue = load_catalogue(parquet(tmp_path, path=path, **sizes))
    assert catalogue.paths.to_pylist() == ["a.mp4", "b.mp4"]
    assert catalogue.num_empty_texts == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",x,60,240,426,30", "an empty path"),
        ("a.gif,x,60,240,426,30", "an unknown file extension"),
        ("mp4,x,60,240,426,30", "an unknown file extension"),
        ("a.mp4,x,,240,426,30", "num_frames missing or not a number"),
        ("a.mp4,x,NaN,240,426,30", "num_frames missing or not a number"),
        ("a.mp4,x,many,240,426,30", "num_frames missing or not a number"),
        ("a.mp4,x,60,0,426,30", "height zero or negative"),
        ("a.mp4,x,60,240,-426,30", "width zero or negative"),
        ("a.mp4,x,60.5,240,426,30", "num_frames not a whole number"),
        ("a.mp4,x,60,inf,426,30", "height not a whole number"),
        ("a.mp4,x,60,240,1e12,30", "width not a whole number"),
        ("a.jpg,x,60,240,426,30", "an image of more than one frame"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: str, reason: str
) -> None:
    good = "good.mp4,x,60,240,426,30"
    catalogue = load_catalogue(csv(tmp_path, good, row, good.replace("good", "other")))
    assert catalogue.dropped == {reason: 1}
    assert catalogue.ids.tolist() == [0, 2]
    assert catalogue.num_file_rows == 3
    assert f"1 with {reason} (first: row 1" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(DataError, match=f"no usable row: 1 rows.*1 with {reason}"):
        load_catalogue(csv(tmp_path, row))


def test_unknown_frame_rates_are_no_reason_to_leave_a_row_out(tmp_path: Path) -> None:
    catalogue = load_catalogue(csv(tmp_path, "a.mp4,x,60,240,426,fast", "b.mp4,x,60,240,426,24"))
    assert math.isnan(catalogue.fps[0])
    assert catalogue.fps[1] == 24


def test_rows_without_caption_are_kept_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalogue = load_catalogue(csv(tmp_path, "a.mp4,,60,240,426,30", "b.mp4,  ,60,240,426,30", "c.mp4,x,60,240,426,30"))
    assert [catalogue.row_text(i) for i in range(3)] == ["", "", "x"]
    assert catalogue.num_empty_texts == 2
    assert "2 rows have no caption" in caplog.text


def test_a_catalogue_without_captions_or_frame_rates_is_read(tmp_path: Path) -> None:
    catalogue = load_catalogue(csv(tmp_path, "a.mp4,60,240,426", header="path,num_frames,height,width"))
    assert (catalogue.row_text(0), catalogue.num_empty_texts) == ("", 1)
    assert np.isnan(catalogue.fps).all()


def test_rows_with_the_same_path_are_kept_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = "a.mp4,x,60,240,426,30"
    catalogue = load_catalogue(csv(tmp_path, row, row, row.replace("x", "other words"), "b.mp4,x,60,240,426,30"))
    assert len(catalogue) == 4
    assert catalogue.num_duplicates == 2
    assert "2 rows have the path of an earlier row; all are kept" in caplog.text


def test_repeats_have_ids_of_their_own_that_do_not_depend_on_dropped_rows(tmp_path: Path) -> None:
    catalogue = load_catalogue(
        csv(tmp_path, "a.mp4,one,60,240,426,30", "b.txt,x,60,1,1,30", "c.mp4,two,70,144,256,30"), repeats=3
    )
    assert catalogue.ids.tolist() == [0, 2, 3, 5, 6, 8]
    assert catalogue.num_frames.tolist() == [60, 70] * 3
    assert [catalogue.row_text(i) for i in range(6)] == ["one", "two"] * 3
    assert catalogue.row_path(5) == str(tmp_path / "c.mp4")


def test_relative_paths_start_from_the_catalogue_or_from_the_root(tmp_path: Path) -> None:
    rows = [f"{path},x,60,240,426,30" for path in ("b/../a.mp4", "/data/a.mp4", "s3://other/a.mp4")]
    uri = csv(tmp_path, *rows)
    here = load_catalogue(uri)
    assert [here.row_path(i) for i in range(3)] == [str(tmp_path / "a.mp4"), "/data/a.mp4", "s3://other/a.mp4"]
    assert load_catalogue(uri, root="/clips/").row_path(0) == "/clips/a.mp4"
    assert load_catalogue(uri, root="s3://bucket/clips").row_path(0) == "s3://bucket/clips/a.mp4"


def test_a_catalogue_in_an_object_store_names_its_clips_there() -> None:
    Storage("memory://catalogue").write("sets/c.csv", f"{HEADER}\nclips/a.mp4,x,60,240,426,30\n".encode())
    catalogue = load_catalogue("memory://catalogue/sets/c.csv")
    assert catalogue.row_path(0) == "memory://catalogue/sets/clips/a.mp4"


@pytest.mark.parametrize(
    ("header", "missing"),
    [("path,text,num_frames,height,wide", "'width'"), ("file,num_frames,h,width", "'path', 'height'")],
)
def test_a_missing_column_is_named_with_the_columns_present(tmp_path: Path, header: str, missing: str) -> None:
    uri = csv(tmp_path, header=header)
    with pytest.raises(DataError) as error:
        load_catalogue(uri)
    assert f"{uri} has no column {missing}; its columns are " in error.value.message
    for column in header.split(","):
        assert repr(column) in error.value.message


def test_a_missing_column_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column 'height', 'width'; its columns are 'path', 'num_frames'"):
        load_catalogue(parquet(tmp_path, path=["a.mp4"], num_frames=[60]))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    uri = csv(tmp_path, "a.mp4,60,240,426,b.mp4", header="path,num_frames,height,width,path")
    with pytest.raises(DataError, match="'path' twice"):
        load_catalogue(uri)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "is empty"),
        ("a.csv", f"{HEADER}\n".encode(), "no usable row: 0 rows in the file"),
        ("a.csv", f"{HEADER}\na.mp4,x,60\n".encode(), "Expected 6 columns, got 3"),
        ("a.csv", f"{HEADER}\na.mp4,caf\xe9,60,240,426,30\n".encode("latin-1"), "UTF"),
        ("a.parquet", b"PAR1 but no more", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.json", b"[]", "ends in none of .csv, .parquet"),
    ],
)
def test_a_file_that_is_no_catalogue_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_catalogue(str(tmp_path / name))
    assert str(tmp_path / name) in error.value.message
    assert error.value.hint


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'width' is of type list"):
        load_catalogue(parquet(tmp_path, path=["a.mp4"], num_frames=[60], height=[1], width=[[1]]))


def test_a_missing_file_and_repeats_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFoundError):
        load_catalogue(str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match="repeats=0"):
        load_catalogue(csv(tmp_path, "a.mp4,x,60,240,426,30"), repeats=0)


def test_the_digest_follows_content_and_repeats_and_not_the_place(tmp_path: Path) -> None:
    row = "a.mp4,x,60,240,426,30"
    uri = csv(tmp_path, row)
    digest = load_catalogue(uri).digest
    assert load_catalogue(csv(tmp_path, row, name="copy.csv"), root="/elsewhere").digest == digest
    assert load_catalogue(uri, repeats=2).digest != digest
    assert load_catalogue(csv(tmp_path, row.replace("x", "y"), name="other.csv")).digest != digest
