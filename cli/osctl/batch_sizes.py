"""Batch sizes that were found, written into the files that have the old ones.

Only numbers are replaced, where they stand: comments, order and layout of a file stay. What does not stand there as a
plain number cannot be replaced, and is refused with the text to paste.
"""

from __future__ import annotations

import ast
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osctl.errors import UsageError
from osctl.manifests import RUN

Sizes = Mapping[tuple[str, int], int]
"""(Resolution, frames) → batch size."""
_KEY = "bucket_config"


@dataclass(frozen=True)
class Change:
    """A number of a file, and what it becomes."""

    bucket: tuple[str, int]
    start: int
    """Place in the text, in characters."""
    end: int
    old: int
    new: int


def parse_bucket(name: str) -> tuple[str, int]:
    """`240p/51` as resolution and frames."""
    resolution, _, frames = name.partition("/")
    return resolution, int(frames)


def change_file(path: str, sizes: Sizes) -> list[Change]:
    """Write the sizes where the file has others, all or none of them; what was changed.

    Raises:
        UsageError: they cannot be written there. It has the text to paste.
    """
    try:
        text = Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="give a run file or a config") from error
    try:
        places = _places(path, text)
        missing = [f"{resolution}/{frames}" for resolution, frames in sizes if (resolution, frames) not in places]
        if missing:
            raise _UnsafeError(f"it has no number for {', '.join(missing)}")
        changes = [
            Change(bucket, *places[bucket], old=old, new=size)
            for bucket, size in sizes.items()
            if (old := _number(text, places[bucket])) != size
        ]
        changes.sort(key=lambda change: change.start)
        new = text
        for change in reversed(changes):
            new = new[: change.start] + str(change.new) + new[change.end :]
        found = {bucket: _number(new, place) for bucket, place in _places(path, new).items() if bucket in sizes}
        if found != dict(sizes):
            raise _UnsafeError("it is laid out in a way that is not understood")
    except _UnsafeError as error:
        raise UsageError(
            f"{path} cannot be changed safely: {error}",
            hint=f"write it yourself, with your own shares: {as_setting(sizes)}",
        ) from error
    if changes:
        _replace(Path(path), new)
    return changes


def _replace(target: Path, text: str) -> None:
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_bytes(text.encode())
        part.chmod(target.stat().st_mode & 0o777)
        os.replace(part, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}", hint="check its owner and mode") from error


def as_setting(sizes: Sizes) -> str:
    """The sizes as text for a config: every clip of a bucket is kept, as with a probability of 1."""
    table: dict[str, list[str]] = {}
    for (resolution, frames), size in sizes.items():
        table.setdefault(resolution, []).append(f"{frames}: [1.0, {size}]")
    return f"{_KEY}: {{" + ", ".join(f"{name}: {{{', '.join(rows)}}}" for name, rows in table.items()) + "}"


class _UnsafeError(Exception):
    """Why numbers of a file cannot be replaced."""


Span = tuple[int, int]


def _places(path: str, text: str) -> dict[tuple[str, int], Span]:
    return dict(_places_of_python(text) if path.endswith(".py") else _places_of_yaml(text))


def _number(text: str, span: Span) -> int:
    return int(text[span[0] : span[1]])


def _line_starts(text: str) -> list[int]:
    return [0, *(index + 1 for index, char in enumerate(text) if char == "\n")]


# ---------------------------------------------------------------------------------------------------------------- YAML

Place = tuple[tuple[str, int], Span]


def _places_of_yaml(text: str) -> Iterator[Place]:
    """Of a config, or of the config inside a run file."""
    import yaml  # slow to import

    try:
        documents = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
    except yaml.YAMLError as error:
        raise _UnsafeError(f"it is no YAML ({' '.join(str(error).split())})") from error
    runs = [node for node in documents if _scalar(_entry(node, "kind")) == RUN]
    if not runs and len(documents) == 1:
        yield from _places_of_config(documents[0])
        return
    if len(runs) != 1:
        raise _UnsafeError(f"it has {len(runs)} TrainingRuns")
    inline = _entry(runs[0], "spec", "config", "inline")
    if inline is None or inline.style != "|":
        raise _UnsafeError("its run has no config in a block (`inline: |`)")
    overrides = getattr(_entry(runs[0], "spec", "config", "overrides"), "value", None)
    for override in overrides if isinstance(overrides, list) else ():
        if _KEY in str(override.value) or "batch_table" in str(override.value):
            raise _UnsafeError(f"its spec.config.overrides say {override.value}")
    yield from _places_of_block(text, inline)


def _places_of_block(text: str, node: Any) -> Iterator[Place]:
    """Of the YAML inside a block: its lines are those of the file, less what they are indented by."""
    import yaml

    inner, starts = str(node.value), _line_starts(text)
    inner_starts = _line_starts(inner)
    try:
        config = yaml.compose(inner, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _UnsafeError(f"the config inside is no YAML ({' '.join(str(error).split())})") from error
    for bucket, (start, end) in _places_of_config(config):
        row = bisect_right(inner_starts, start) - 1
        line = text[starts[node.start_mark.line + 1 + row] :].partition("\n")[0]
        inner_line = inner[inner_starts[row] :].partition("\n")[0]
        if not line.rstrip("\r").endswith(inner_line):
            raise _UnsafeError("its block is laid out in a way that is not understood")
        shift = starts[node.start_mark.line + 1 + row] + line.rindex(inner_line) - inner_starts[row]
        yield bucket, (start + shift, end + shift)


def _places_of_config(config: Any) -> Iterator[Place]:
    table = _entry(config, "data", _KEY) or _entry(config, _KEY)
    if table is None:
        raise _UnsafeError(f"it has no {_KEY}")
    if _scalar(_entry(config, "data", "batch_table")) not in (None, "", "null", "~"):
        raise _UnsafeError("it takes its batch sizes from data.batch_table")
    seen: set[int] = set()
    for resolution, level in _pairs(table):
        for frames, entry in _pairs(level):
            values = getattr(entry, "value", None)
            if not frames.isdigit() or not isinstance(values, list) or len(values) != 2:
                continue
            start, end, number = values[1].start_mark.index, values[1].end_mark.index, _scalar(values[1])
            if number is None or not (number.isascii() and number.isdigit()):
                continue
            if start in seen:
                raise _UnsafeError("several buckets share one number (an alias)")
            seen.add(start)
            yield (resolution, int(frames)), (start, end)


def _pairs(node: Any) -> list[tuple[str, Any]]:
    pairs = node.value if type(node).__name__ == "MappingNode" else []
    return [(str(key.value), value) for key, value in pairs]


def _entry(node: Any, *path: str) -> Any:
    for name in path:
        node = dict(_pairs(node)).get(name)
    return node


def _scalar(node: Any) -> str | None:
    return str(node.value) if type(node).__name__ == "ScalarNode" else None


# -------------------------------------------------------------------------------------------------------------- Python


def _places_of_python(text: str) -> Iterator[Place]:
    """Of a table that stands in the file as it is: nothing is run, so nothing that is computed can be changed."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise _UnsafeError(f"it is no Python (line {error.lineno})") from error
    tables = list(_tables_of_python(tree))
    if len(tables) != 1:
        raise _UnsafeError(
            f"it has {len(tables)} plain tables called {_KEY}" if tables else f"it has no {_KEY} of its own"
        )
    if any(_changes_table(node) for node in ast.walk(tree)):
        raise _UnsafeError(f"it changes its {_KEY} after it has made it")
    starts = _line_starts(text)

    def place(line: int, column: int) -> int:
        """Python counts bytes in a line."""
        return starts[line - 1] + len(text[starts[line - 1] :].encode()[:column].decode())

    for resolution, level in _items(tables[0]):
        for frames, entry in _items(level):
            if not isinstance(entry, ast.Tuple | ast.List) or len(entry.elts) != 2:
                continue
            number = entry.elts[1]
            if isinstance(number, ast.Constant) and type(number.value) is int and isinstance(frames, int):
                assert number.end_lineno is not None
                assert number.end_col_offset is not None
                start, end = place(number.lineno, number.col_offset), place(number.end_lineno, number.end_col_offset)
                if text[start:end].isdigit():
                    yield (str(resolution), frames), (start, end)


def _changes_table(node: ast.AST) -> bool:
    """`bucket_config[…] = …`, `bucket_config.update(…)`."""
    if isinstance(node, ast.Subscript):
        return not isinstance(node.ctx, ast.Load) and _is_table(node.value)
    return isinstance(node, ast.Attribute) and _is_table(node.value)


def _is_table(node: ast.expr) -> bool:
    """The name itself, or an entry of what it names."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name) and node.id == _KEY


def _tables_of_python(tree: ast.Module) -> Iterator[ast.Dict]:
    """`bucket_config = {…}`, `data = dict(bucket_config={…})` and `data = {"bucket_config": {…}}`."""
    for node in tree.body:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            continue
        value: ast.expr | None = node.value
        if node.targets[0].id == "data":
            if isinstance(value, ast.Call):
                value = next((keyword.value for keyword in value.keywords if keyword.arg == _KEY), None)
            else:
                value = next((entry for key, entry in _items(node.value) if key == _KEY), None)
        elif node.targets[0].id != _KEY:
            continue
        if isinstance(value, ast.Dict):
            yield value


def _items(node: ast.expr) -> list[tuple[Any, ast.expr]]:
    if not isinstance(node, ast.Dict):
        return []
    pairs = zip(node.keys, node.values, strict=True)
    return [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
