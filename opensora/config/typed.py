"""From plain values to the typed, frozen dataclasses, with every problem found in one pass."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, TypeVar

from opensora.config.documents import Document, KeyPath, describe
from opensora.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config."""

    message: str
    hint: str | None = None


class _Wrong:
    """Stands for a value that could not be converted."""


_WRONG = _Wrong()


def config_from_mapping(cls: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """Typed settings from plain values, for example from parsed YAML.

    Args:
        cls: one of the dataclasses of `opensora.config`.
        mapping: keys and values; lists stand for tuples, component settings are chosen by their `type`.
        source: what error messages call the origin of the values.

    Raises:
        ConfigError: with all unknown keys, wrong types and impossible combinations at once.
    """
    problems: list[Problem] = []
    config = build(cls, Document(source, dict(mapping)), problems)
    raise_problems(problems)
    assert config is not None
    return config


def build(cls: type[T], document: Document, problems: list[Problem]) -> T | None:
    """The typed form of a document; `None` after adding to `problems` when it has none."""
    config = _Builder(cls, document, problems).settings(cls, document.values, ())
    return None if isinstance(config, _Wrong) else config


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one error for all of them; nothing when there are none."""
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        raise ConfigError(unique[0].message, hint=unique[0].hint)
    if unique:
        lines = [f"{p.message}; {p.hint}" if p.hint else p.message for p in unique]
        raise ConfigError(f"{len(unique)} settings are wrong:\n" + "\n".join(f"  - {line}" for line in lines))


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name → resolved annotation, in order."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def field_default(cls: type, name: str) -> Any:
    """The default of a field; `dataclasses.MISSING` when it is required."""
    item = next(item for item in dataclasses.fields(cls) if item.name == name)
    return item.default_factory() if item.default_factory is not MISSING else item.default


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; the annotation itself when it is none. `None` stands for its own type."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(None if member is type(None) else member for member in typing.get_args(annotation))
    return (annotation,)


def settings_classes(annotation: Any) -> list[type]:
    """The dataclasses among the alternatives of an annotation."""
    return [member for member in members(annotation) if dataclasses.is_dataclass(member) and isinstance(member, type)]


def select_class(cls: type, name: str, value: Any) -> type | None:
    """The dataclass that the settings `value` of a field belong to: by `type`, else the field's default.

    `None` when the type is unknown.
    """
    classes = settings_classes(field_types(cls)[name])
    wanted = value.get("type") if isinstance(value, Mapping) else None
    if wanted is not None and hasattr(classes[0], "TYPES"):
        return next(
            (member for member in classes if isinstance(wanted, str) and wanted in component_types(member)), None
        )
    default = field_default(cls, name)
    return type(default) if type(default) in classes else classes[0]


def component_types(cls: type) -> dict[str, dict[str, Any]]:
    """Type names of a component's settings and the values that each fixes; empty when it has no `type`."""
    return getattr(cls, "TYPES", {})


@functools.cache
def dotted_keys(cls: type) -> tuple[str, ...]:
    """All keys of a config, those of every component type included."""
    return tuple(dict.fromkeys(_dotted_keys(cls, "")))


def _dotted_keys(cls: type, prefix: str) -> Iterator[str]:
    for name, annotation in field_types(cls).items():
        yield prefix + name
        for member in settings_classes(annotation):
            yield from _dotted_keys(member, f"{prefix}{name}.")


def suggest_key(root: type, cls: type, path: KeyPath) -> str | None:
    """What an unknown key may have meant: a neighbour, or the same name elsewhere in the config."""
    prefix = ".".join(path[:-1])
    close = difflib.get_close_matches(path[-1], field_types(cls), n=2, cutoff=0.7)
    if close:
        return " or ".join(f"{prefix}.{name}" if prefix else name for name in close)
    elsewhere = [key for key in dotted_keys(root) if key.rpartition(".")[2] == path[-1] and key != ".".join(path)]
    if not elsewhere:
        elsewhere = difflib.get_close_matches(".".join(path), dotted_keys(root), n=1, cutoff=0.7)
    return " or ".join(elsewhere[:3]) or None


class _Builder:
    """Converts one document; collects problems instead of stopping at the first."""

    def __init__(self, root: type, document: Document, problems: list[Problem]) -> None:
        self.root = root
        self.document = document
        self.problems = problems

    def wrong(self, path: KeyPath, value: Any, text: str, hint: str | None) -> _Wrong:
        key = ".".join(path)
        shown = f"{key}={describe(value)}" if key else describe(value)
        self.problems.append(Problem(f"{shown} ({self.document.where(path)}): {text}", hint))
        return _WRONG

    def settings(self, cls: type, value: Any, path: KeyPath) -> Any:
        """An instance of a dataclass."""
        if not isinstance(value, Mapping):
            name = path[-1] if path else "config"
            return self.wrong(path, value, f"expected the settings of {name}", "write keys with values")
        annotations = field_types(cls)
        fixed = component_types(cls).get(value.get("type", ""), {}) if isinstance(value.get("type", ""), str) else {}
        given: dict[str, Any] = dict(fixed)
        complete = True
        for key, item in value.items():
            inner = (*path, str(key))
            if key not in annotations:
                self._unknown_key(cls, inner, item)
                complete = False
                continue
            classes = settings_classes(annotations[key])
            if classes and not (item is None and None in members(annotations[key])):
                given[key] = self._component(cls, key, item, inner)
            else:
                given[key] = self.value(annotations[key], item, inner)
            complete = complete and not isinstance(given[key], _Wrong)
        for item in dataclasses.fields(cls):
            if item.name not in given and field_default(cls, item.name) is MISSING:
                complete = self._required(cls, (*path, item.name))
        if not complete:
            return _WRONG
        try:
            return cls(**given)
        except ConfigError as error:
            key = re.match(r"[\w.]+", error.message)
            place = self.document.where(tuple(key.group().split(".")) if key else path)
            self.problems.append(Problem(f"{error.message} ({place})", error.hint))
            return _WRONG

    def _unknown_key(self, cls: type, path: KeyPath, value: Any) -> None:
        if path[-1].startswith("_"):
            hint: str | None = "`_base_` and names of the file's own work in .py configs, at the top level"
        elif owners := self._owners(path):
            hint = f"the type {' or '.join(owners)} has it; change the type as a whole: {path[-2]}={{type: …}}"
        elif close := suggest_key(self.root, cls, path):
            hint = f"did you mean {close}?"
        else:
            hint = f"known here: {', '.join(field_types(cls))}"
        self.wrong(path, value, "unknown key", hint)

    def _owners(self, path: KeyPath) -> list[str]:
        """Types of the same component that do have the key."""
        if len(path) != 2 or path[0] not in field_types(self.root):
            return []
        classes = settings_classes(field_types(self.root)[path[0]])
        return [name for member in classes if path[1] in field_types(member) for name in component_types(member)]

    def _required(self, cls: type, path: KeyPath) -> bool:
        """Report what is missing: the key, or the required keys inside it. False, since the settings are incomplete."""
        inner = settings_classes(field_types(cls)[path[-1]])
        if inner:
            self.settings(inner[0], {}, path)
        else:
            key = ".".join(path)
            self.problems.append(
                Problem(f"{key} is required but not set ({self.document.where(path)})", f"add it, or give {key}=…")
            )
        return False

    def _component(self, cls: type, name: str, value: Any, path: KeyPath) -> Any:
        chosen = select_class(cls, name, value)
        if chosen is None:
            known = [known for member in settings_classes(field_types(cls)[name]) for known in component_types(member)]
            wanted = value["type"]
            close = difflib.get_close_matches(wanted, known, n=1) if isinstance(wanted, str) else []
            hint = f"did you mean {close[0]!r}?" if close else f"known types: {', '.join(known)}"
            return self.wrong((*path, "type"), wanted, f"unknown {name} type", hint)
        return self.settings(chosen, value, path)

    def value(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        """A value of the annotated type; scalars are never guessed from text."""
        if annotation is Any:
            return self._any(value, path)
        alternatives = members(annotation)
        if len(alternatives) > 1:
            return self._union(annotation, alternatives, value, path)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Literal:
            return self._literal(arguments, value, path)
        if origin is tuple:
            return self._tuple(arguments, value, path)
        if origin is dict:
            return self._dict(arguments, value, path)
        return self._scalar(annotation, value, path)

    def _scalar(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        if annotation is bool and isinstance(value, bool):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            if annotation is int:
                return value
            if annotation is float and abs(value) < 1 << 1000:
                return float(value)
        if isinstance(value, float):
            if not math.isfinite(value):
                return self.wrong(path, value, "not a finite number", "use an ordinary number")
            if annotation is float:
                return value
            if annotation is int and value.is_integer():  # 1e5 steps
                return int(value)
        if annotation is str and isinstance(value, str):
            if _is_unicode(value):
                return value
            return self.wrong(path, value, "not valid Unicode text", "save the file as UTF-8")
        expected, hint = _EXPECTED[annotation]
        if annotation is str and isinstance(value, int | float | bool):
            hint = f"put it in quotes: '{value}'"
        return self.wrong(path, value, f"expected {expected}", hint)

    def _literal(self, choices: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
        close = difflib.get_close_matches(value, map(str, choices), n=1) if isinstance(value, str) else []
        listed = ", ".join(map(str, choices))
        return self.wrong(path, value, f"not one of {listed}", f"did you mean {close[0]}?" if close else None)

    def _union(self, annotation: Any, alternatives: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        if value is None and None in alternatives:
            return None
        some = [alternative for alternative in alternatives if alternative is not None]
        if len(some) == 1:
            return self.value(some[0], value, path)
        for alternative in some:
            attempt: list[Problem] = []
            converted = _Builder(self.root, self.document, attempt).value(alternative, value, path)
            if not attempt:
                return converted
        return self.wrong(path, value, f"expected {type_text(annotation)}", None)

    def _tuple(self, arguments: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        variable = len(arguments) == 2 and arguments[1] is Ellipsis
        if not isinstance(value, list | tuple):
            hint = f"write a list: [{value}]" if variable and isinstance(value, str | int | float) else "write a list"
            return self.wrong(path, value, f"expected {type_text(tuple[arguments])}", hint)  # type: ignore[valid-type]
        kinds = [arguments[0]] * len(value) if variable else list(arguments)
        if len(value) != len(kinds):
            return self.wrong(path, value, f"expected {len(kinds)} items, found {len(value)}", None)
        pairs = enumerate(zip(kinds, value, strict=True))
        converted = tuple(self.value(kind, item, (*path, str(index))) for index, (kind, item) in pairs)
        return _WRONG if any(isinstance(item, _Wrong) for item in converted) else converted

    def _dict(self, arguments: tuple[Any, ...], value: Any, path: KeyPath) -> Any:
        if not isinstance(value, Mapping):
            return self.wrong(path, value, "expected keys with values", None)
        converted: dict[Any, Any] = {}
        complete = True
        for key, item in value.items():
            inner = (*path, str(key))
            typed_key = _dict_key(arguments[0], key)
            if isinstance(typed_key, _Wrong):
                complete = not self.wrong(inner, item, f"the key must be {_EXPECTED[arguments[0]][0]}", None) and False
                continue
            if typed_key in converted:
                self.wrong(inner, item, "the key is given twice", "remove one of them")
                complete = False
            converted[typed_key] = self.value(arguments[1], item, inner)
            complete = complete and not isinstance(converted[typed_key], _Wrong)
        return converted if complete else _WRONG

    def _any(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, list | tuple):
            items = tuple(self._any(item, (*path, str(index))) for index, item in enumerate(value))
            return _WRONG if any(isinstance(item, _Wrong) for item in items) else items
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return self.wrong(path, value, "expected a plain value or a list", None)


_EXPECTED: dict[Any, tuple[str, str | None]] = {
    bool: ("true or false", "write true or false, without quotes"),
    int: ("a whole number", "write digits, without quotes"),
    float: ("a number", "write digits, without quotes"),
    str: ("text", "write text"),
}


def _dict_key(annotation: Any, key: Any) -> Any:
    """A key of the annotated type: YAML reads `512:` as a number and JSON has only text."""
    if annotation is str and isinstance(key, int | str) and not isinstance(key, bool):
        return str(key) if _is_unicode(str(key)) else _WRONG
    if annotation is int and isinstance(key, int) and not isinstance(key, bool):
        return key
    if annotation is int and isinstance(key, str) and re.fullmatch("[0-9]{1,18}", key):
        return int(key)
    return _WRONG


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def type_text(annotation: Any) -> str:
    """A type as the reference page and messages write it."""
    alternatives = members(annotation)
    if len(alternatives) > 1:
        return " or ".join(type_text(alternative) for alternative in alternatives)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None:
        return "null"
    if origin is Literal:
        return " or ".join(f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(type_text(argument) for argument in arguments)}]"
    if origin is dict:
        return f"{{{type_text(arguments[0])}: {type_text(arguments[1])}}}"
    if dataclasses.is_dataclass(annotation):
        return f"settings ({getattr(annotation, '__name__', annotation)})"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "number or list"}
    return names[annotation]
