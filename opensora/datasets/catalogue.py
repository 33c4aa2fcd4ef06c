"""The catalogue: a table of clips (CSV or Parquet), read and checked once.

Columns: `path`, `num_frames`, `height` and `width` are needed, `text` and `fps` are used when there, others are not
read. Rows that cannot be used are left out and counted by reason. A row keeps its number in the file as its id, so that
what is drawn for it does not depend on the rows left out.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from opensora.config.train import StorageConfig
from opensora.errors import ConfigError, DataError
from opensora.storage import Storage, locate

logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".m2ts", ".webm")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_SIZES = ("num_frames", "height", "width")
_REQUIRED = ("path", *_SIZES)
_OPTIONAL = ("text", "fps")
_LARGEST_SIZE = 2**31 - 1
_CSV_BLOCK_BYTES = 8 * 1024 * 1024
"""Also the longest row that can be read."""
_NOT_A_NUMBER = ("", "na", "n/a", "nan", "null", "none")
"""What stands for a missing number in CSV files, in any case."""
_DEFAULT_STORAGE = StorageConfig()


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The usable rows of a catalogue, `repeats` times over. Positions run over all of them."""

    uri: str
    digest: str
    """SHA-256 of the file's content and of the settings that change which rows there are.

    Not of the folder: a copy of a data set in another place is the same data set.
    """
    ids: NDArray[np.int64]
    """[n] row number in the file before anything was dropped + repeat x num_file_rows: the key of a row's draws."""
    num_frames: NDArray[np.int32]
    """[n]; 1 is an image."""
    height: NDArray[np.int32]
    """[n] in pixels."""
    width: NDArray[np.int32]
    """[n] in pixels."""
    fps: NDArray[np.float32]
    """[n] frames per second; not a number where unknown."""
    paths: pa.ChunkedArray
    """[n / repeats] as in the file."""
    texts: pa.ChunkedArray
    """[n / repeats] as in the file; blank where there is no caption."""
    root: str
    """What relative paths start from."""
    num_file_rows: int
    dropped: dict[str, int]
    """Reason → rows of the file that were left out for it."""
    num_empty_texts: int
    """Rows kept without a caption."""
    num_duplicates: int
    """Rows kept whose path an earlier one has."""

    def __len__(self) -> int:
        return len(self.ids)

    def row_path(self, row: int) -> str:
        """Absolute local path or URI of the clip at a position."""
        path: str = self.paths[row % len(self.paths)].as_py()
        if "://" in path or os.path.isabs(path):
            return path
        scheme, separator, root = self.root.rpartition("://")
        return scheme + separator + posixpath.normpath(posixpath.join(root, path))

    def row_text(self, row: int) -> str:
        """Caption of the clip at a position; empty when it has none."""
        text: str = self.texts[row % len(self.texts)].as_py()
        return text.strip()


def load_catalogue(
    uri: str, *, root: str | None = None, repeats: int = 1, config: StorageConfig = _DEFAULT_STORAGE
) -> Catalogue:
    """Read and check a catalogue.

    Left out, and counted in `dropped` by the first reason that holds: a row without path; with an extension that is
    neither a video's nor an image's; whose frames, height or width is missing, not a whole number or not positive; an
    image with more than one frame. Kept: rows without caption, and rows whose path another one has as well (two
    captions of one clip, say); both are counted and, as everything left out, said in a warning.

    Args:
        uri: a `.csv`, `.parquet` or `.parquet.gzip` file; local or in an object store.
        root: folder that relative paths start from; the catalogue's own unless given.
        repeats: how often each row appears.
        config: how object stores are reached.

    Raises:
        DataError: the file is of another kind or damaged, lacks a column, or has no usable row.
        ConfigError: `repeats` is below 1.
        StorageError: the file cannot be read.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats} is below 1", hint="use a whole number from 1")
    read = _reader(uri)
    storage, name = locate(uri, config=config)
    content = storage.read(name)
    digest = hashlib.sha256(b"catalogue 1 ")
    digest.update(hashlib.sha256(content).digest())
    digest.update(f" repeats {repeats}".encode())
    uri = storage.uri_of(name)
    try:
        table = read(content, uri)
    except pa.ArrowInvalid as error:
        raise DataError(f"{uri} cannot be read: {error}", hint="write the file again, as UTF-8") from error
    del content
    checks = _Checks(table)
    kept = checks.usable
    if not kept.any():
        reasons = "".join(f"; {checks.describe(reason)}" for reason in checks.dropped)
        raise DataError(
            f"{uri} has no usable row: {table.num_rows} rows in the file{reasons}",
            hint=f"each row needs a path to a video or image, and positive whole numbers as {', '.join(_SIZES)}",
        )
    paths, texts = table["path"], _texts(table)
    if not kept.all():
        mask = pa.array(kept)
        paths, texts = paths.filter(mask), texts.filter(mask)
    catalogue = Catalogue(
        uri=uri,
        digest=digest.hexdigest(),
        ids=_repeated(np.flatnonzero(kept), repeats, step=table.num_rows),
        num_frames=np.tile(checks.sizes["num_frames"][kept], repeats),
        height=np.tile(checks.sizes["height"][kept], repeats),
        width=np.tile(checks.sizes["width"][kept], repeats),
        fps=np.tile(_fps(table)[kept], repeats),
        paths=paths,
        texts=texts,
        root=storage.uri if root is None else Storage(root, config=config).uri,
        num_file_rows=table.num_rows,
        dropped=checks.dropped,
        num_empty_texts=pc.sum(pc.match_substring_regex(texts, r"^\s*$")).as_py(),
        num_duplicates=len(paths) - pc.count_distinct(paths).as_py(),
    )
    _report(catalogue, checks)
    return catalogue


def _report(catalogue: Catalogue, checks: _Checks) -> None:
    for reason in catalogue.dropped:
        logger.warning("%s: left out: %s", catalogue.uri, checks.describe(reason))
    if catalogue.num_empty_texts:
        logger.warning("%s: %d rows have no caption", catalogue.uri, catalogue.num_empty_texts)
    if catalogue.num_duplicates:
        logger.warning(
            "%s: %d rows have the path of an earlier row; all are kept", catalogue.uri, catalogue.num_duplicates
        )


class _Checks:
    """Which rows of a table can be used, and why the others cannot."""

    def __init__(self, table: pa.Table) -> None:
        self._paths = table["path"]
        self._first: dict[str, int] = {}
        self.usable: NDArray[np.bool_] = np.ones(table.num_rows, np.bool_)
        self.dropped: dict[str, int] = {}
        self.sizes: dict[str, NDArray[np.int32]] = {}
        lower = pc.utf8_lower(table["path"])
        is_image = _ends_with(lower, IMAGE_EXTENSIONS)
        self._drop("an empty path", _mask(pc.equal(pc.utf8_length(lower), 0)))
        self._drop("an unknown file extension", ~(is_image | _ends_with(lower, VIDEO_EXTENSIONS)))
        for column in _SIZES:
            values = _numbers(table[column])
            self._drop(f"{column} missing or not a number", np.isnan(values))
            values = np.where(np.isnan(values), 1, values)
            self._drop(f"{column} zero or negative", values <= 0)
            self._drop(f"{column} not a whole number", (values != np.floor(values)) | (values > _LARGEST_SIZE))
            self.sizes[column] = np.where(self.usable, values, 0).astype(np.int32)
        self._drop("an image of more than one frame", is_image & (self.sizes["num_frames"] > 1))

    def _drop(self, reason: str, bad: NDArray[np.bool_]) -> None:
        bad = bad & self.usable
        if count := int(bad.sum()):
            self.dropped[reason] = count
            self._first[reason] = int(bad.argmax())
            self.usable &= ~bad

    def describe(self, reason: str) -> str:
        """How many rows, why, and the first of them; rows are counted from 0 after the header."""
        row = self._first[reason]
        return f"{self.dropped[reason]} with {reason} (first: row {row}, path {self._paths[row].as_py()!r})"


def _repeated(rows: NDArray[np.int64], repeats: int, *, step: int) -> NDArray[np.int64]:
    return (np.arange(repeats)[:, None] * step + rows).ravel()


def _mask(values: pa.ChunkedArray) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = values.to_numpy().astype(np.bool_)
    return mask


def _ends_with(values: pa.ChunkedArray, extensions: tuple[str, ...]) -> NDArray[np.bool_]:
    return _mask(pc.match_substring_regex(values, rf"({'|'.join(extensions)})$".replace(".", r"\.")))


def _texts(table: pa.Table) -> pa.ChunkedArray:
    if "text" not in table.column_names:
        return pa.chunked_array([pa.repeat(pa.scalar(""), table.num_rows)])
    return table["text"]


def _fps(table: pa.Table) -> NDArray[np.float32]:
    if "fps" not in table.column_names:
        return np.full(table.num_rows, np.nan, np.float32)
    return _numbers(table["fps"]).astype(np.float32)


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A column as float64; not a number where there is none, be it missing or some other text."""
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        missing = pc.is_in(pc.utf8_lower(column), value_set=pa.array(_NOT_A_NUMBER))
        column = pc.if_else(missing, pa.scalar(None, pa.string()), column)
        try:
            column = pc.cast(column, pa.float64())
        except pa.ArrowInvalid:
            return np.array([_number(value) for value in column.to_pylist()])
    values: NDArray[np.float64] = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


def _number(text: str | None) -> float:
    try:
        return float(text) if text is not None else np.nan
    except ValueError:
        return np.nan


_Reader = Callable[[bytes, str], pa.Table]


def _read_csv(content: bytes, uri: str) -> pa.Table:
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    header = _csv_header(content, parse, uri)
    columns = _columns(header, uri)
    return pa.csv.read_csv(
        pa.BufferReader(content),
        read_options=pa.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        parse_options=parse,
        # Numbers are read as text as well: one word in a column of numbers must not end the run, and is to be counted.
        convert_options=pa.csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.string())
        ),
    )


def _csv_header(content: bytes, parse: Any, uri: str) -> list[str]:
    if not content.strip():
        raise DataError(f"{uri} is empty", hint=f"the first line names the columns: {', '.join(_REQUIRED)}, text")
    with pa.csv.open_csv(
        pa.BufferReader(content), read_options=pa.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES), parse_options=parse
    ) as reader:
        names: list[str] = reader.schema.names
    return names


def _read_parquet(content: bytes, uri: str) -> pa.Table:
    file = pa.parquet.ParquetFile(pa.BufferReader(content))
    columns = _columns(file.schema_arrow.names, uri)
    table = file.read(columns=columns)
    for name in columns:
        table = table.set_column(table.column_names.index(name), name, _plain(table[name], name, uri))
    return table


def _plain(column: pa.ChunkedArray, name: str, uri: str) -> pa.ChunkedArray:
    """Texts without nulls as strings; numbers as numbers, or as strings where the file has them so."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        # Chunk by chunk: one chunk of `string` holds 2 GiB at most, and files have smaller row groups.
        column = column if pa.types.is_string(kind) else pc.cast(column, pa.string())
        return pc.fill_null(column, "") if column.null_count else column
    if name in (*_SIZES, "fps") and is_number:
        return column
    raise DataError(f"{uri}: the column {name!r} is of type {kind}", hint="write numbers as numbers, the rest as text")


def _columns(present: list[str], uri: str) -> list[str]:
    """The columns to read. Raises DataError when a needed one is missing."""
    missing = [name for name in _REQUIRED if name not in present]
    if missing:
        raise DataError(
            f"{uri} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, present))}",
            hint=f"needed are {', '.join(_REQUIRED)}; text is used when there",
        )
    doubled = [name for name in (*_REQUIRED, *_OPTIONAL) if present.count(name) > 1]
    if doubled:
        raise DataError(f"{uri} has the column {doubled[0]!r} twice", hint="remove or rename one of them")
    return [name for name in (*_REQUIRED, *_OPTIONAL) if name in present]


_READERS: Mapping[str, _Reader] = {
    ".csv": _read_csv, ".parquet": _read_parquet, ".parquet.gzip": _read_parquet,
}  # fmt: skip


def _reader(uri: str) -> _Reader:
    for suffix, read in _READERS.items():
        if uri.lower().endswith(suffix):
            return read
    raise DataError(f"{uri} is no catalogue: its name ends in none of {', '.join(_READERS)}", hint="convert it to CSV")
