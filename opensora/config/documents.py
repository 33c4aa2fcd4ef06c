"""Config files as plain values that remember where each one was written.

YAML and JSON follow the YAML 1.2 core schema: `1e-4` is a number, `9:16`, `yes` and `2024-01-01` are text. A `.py` file
is MMEngine-style: its top-level names are the keys, `_base_` inherits, names that begin with an underscore are its own.
"""

from __future__ import annotations

import ast
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opensora.errors import ConfigError

KeyPath = tuple[str, ...]
"""Keys from the root of a config to a value; list positions and whole-number keys are written as text."""

_STR_TAG = "tag:yaml.org,2002:str"
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2 does."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own attribute)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else, so that every reader sees the same."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        """Text with Unicode's own line breaks keeps them only between double quotes, as escapes."""
        style = '"' if re.search("[\x85\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar(_STR_TAG, data, style=style)

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        """One key a line; only lists are written in one line."""
        return super().represent_mapping(tag, mapping, flow_style=False)


_Dumper.add_representer(str, _Dumper.represent_text)
for _name, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Document:
    """Plain values (mappings, lists, scalars) and where they come from."""

    name: str
    """What a message calls the whole: a file name, or `the command line`."""
    values: dict[Any, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Where single values come from, for example `stage3.py, line 12`; the rest comes from `name`."""

    def where(self, path: KeyPath) -> str:
        """The origin of a value: its own, else that of the first value in it, else that of the nearest around it."""
        if path in self.origins:
            return self.origins[path]
        inside = (origin for known, origin in self.origins.items() if path and known[: len(path)] == path)
        around = (self.origins[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.origins)
        return next(inside, None) or next(around, self.name)

    def forget_origins(self, path: KeyPath) -> None:
        """Drop what is known about a value and everything inside it."""
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]


def read_document(path: str) -> Document:
    """Read a config file by its suffix: `.py`, `.yaml`, `.yml` or `.json`.

    Raises:
        ConfigError: the file is missing, of another kind, or cannot be parsed.
    """
    file = Path(path)
    if file.suffix not in (".py", ".yaml", ".yml", ".json"):
        raise ConfigError(f"{path}: not a config file", hint="a config ends in .yaml, .yml, .json or .py")
    if not file.is_file():
        raise ConfigError(
            f"{path}: there is no such file", hint=f"looked in {Path.cwd()}" if not file.is_absolute() else None
        )
    if file.suffix == ".py":
        return _read_python(file)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})", hint="save the file as UTF-8") from error
    return parse_document(text, name=path)


def parse_document(text: str, *, name: str) -> Document:
    """Read a config from YAML or JSON text.

    Raises:
        ConfigError: it is not valid YAML, holds a key twice, or is not a mapping.
    """
    origins: dict[KeyPath, str] = {}
    values = _parse_yaml(text, name=name, origins=origins)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected keys with values, found {describe(values)}", hint="for example `seed: 42`")
    return Document(name, values, origins)


def parse_value(text: str, *, name: str) -> Any:
    """Read one YAML value, as it stands behind `key=` on a command line.

    Raises:
        ConfigError: it is not valid YAML.
    """
    return _parse_yaml(text, name=name, origins=None)


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML of plain values; reading it gives them back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def describe(value: Any) -> str:
    """A value as a message shows it: short, one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse_yaml(text: str, *, name: str, origins: dict[KeyPath, str] | None) -> Any:
    reader = _NodeReader(name, origins)
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else reader.value(node, (), ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}, line {mark.line + 1}" if mark and origins is not None else name
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply to be a config") from error


class _NodeReader:
    """Plain values of YAML nodes; fills `origins`, when there is one, with the line of each."""

    def __init__(self, name: str, origins: dict[KeyPath, str] | None) -> None:
        self.name = name
        self.origins = origins

    def place(self, node: yaml.Node) -> str:
        return self.name if self.origins is None else f"{self.name}, line {node.start_mark.line + 1}"

    def value(self, node: yaml.Node, path: KeyPath, parents: tuple[yaml.Node, ...]) -> Any:
        if any(node is parent for parent in parents):
            raise ConfigError(f"{self.place(node)}: an alias that contains itself", hint="write the value out")
        if self.origins is not None and path:
            self.origins[path] = self.place(node)
        parents = (*parents, node)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.value(item, (*path, str(index)), parents) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, path, parents)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, parents: tuple[yaml.Node, ...]) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in sources:
                    base = self.value(source, path, parents)
                    if not isinstance(base, dict):
                        raise ConfigError(f"{self.place(source)}: `<<` takes a mapping, found {describe(base)}")
                    merged = {**base, **merged}
                continue
            key = self._scalar(key_node)
            if key in values:
                text = ".".join((*path, str(key)))
                raise ConfigError(f"{self.place(key_node)}: the key {text} is given twice", hint="remove one of them")
            values[key] = self.value(value_node, (*path, str(key)), parents)
        return {**merged, **values}

    def _scalar(self, node: yaml.Node) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            raise ConfigError(f"{self.place(node)}: {kind!r} has no meaning here", hint="use plain keys and values")
        try:
            return _SCALARS[kind](node.value)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{self.place(node)}: {describe(node.value)} is not a valid {kind}") from error


_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": lambda text: int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)),
    "float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    "str": lambda text: text,
    "merge": lambda text: text,
}
"""What a scalar of each YAML kind stands for."""


def _read_python(file: Path) -> Document:
    # Imported here because it takes 0.5 s, and only `.py` configs need it.
    from mmengine.config import Config

    try:
        loaded = Config.fromfile(str(file), lazy_import=False, import_custom_modules=False).to_dict()
    except Exception as error:  # the file is a program: it may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file.resolve())]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        place = f"{file}, line {line}" if line else str(file)
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            traceback.clear_frames(error.__traceback__)  # MMEngine leaves its temporary file open on errors
        raise ConfigError(f"{place}: the config cannot be run: {type(error).__name__}: {error}") from error
    values = {key: value for key, value in loaded.items() if not str(key).startswith("_")}
    return Document(str(file), values, dict(_python_origins(file)))


def _python_origins(file: Path) -> Iterator[tuple[KeyPath, str]]:
    """Line of every key that the file and its bases assign literally; later ones replace earlier ones."""
    try:
        statements = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError):  # a base that MMEngine found elsewhere
        return
    assigned = [
        (target.id, statement.value)
        for statement in statements
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]
    for name, value in assigned:
        if name == "_base_":
            bases = [value] if isinstance(value, ast.Constant) else getattr(value, "elts", [])
            for base in bases:
                if isinstance(base, ast.Constant) and isinstance(base.value, str):
                    yield from _python_origins(file.parent / base.value)
    for name, value in assigned:
        yield from _literal_origins((name,), value, file)


def _literal_origins(path: KeyPath, value: ast.expr, file: Path) -> Iterator[tuple[KeyPath, str]]:
    yield path, f"{file}, line {value.lineno}"
    items: Iterable[tuple[Any, ast.expr]] = ()
    if isinstance(value, ast.Dict):
        items = [
            (key.value, item)
            for key, item in zip(value.keys, value.values, strict=True)
            if isinstance(key, ast.Constant)
        ]
    elif isinstance(value, ast.Call):
        items = [(keyword.arg, keyword.value) for keyword in value.keywords if keyword.arg]
    elif isinstance(value, ast.List | ast.Tuple):
        items = enumerate(value.elts)
    for key, item in items:
        yield from _literal_origins((*path, str(key)), item, file)
