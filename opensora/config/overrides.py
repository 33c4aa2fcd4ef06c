"""`key=value` on the command line: one dotted key, and a value in YAML.

`train.steps=100`, `data.bucket_config.144p.51=[1.0, 2]`, `samples.prompts.0="a cat"`, `train.epochs=null`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from typing import Any

from opensora.config.documents import Document, KeyPath, describe, parse_value
from opensora.config.opensora_keys import our_key
from opensora.config.typed import Problem, field_default, field_types, members, select_class, settings_classes
from opensora.errors import ConfigError


def apply_overrides(cls: type, document: Document, overrides: Sequence[str], problems: list[Problem]) -> list[KeyPath]:
    """Write overrides into the values of a document, later ones over earlier ones; returns the keys written.

    The types of `cls` say what is meant where the text alone does not: text fields take the value as it is written,
    and a list or mapping that is not in the document starts from its default.
    """
    written: list[KeyPath] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.append(
                Problem(
                    f"{describe(override)} (command line): not of the form key=value", "for example train.steps=100"
                )
            )
            continue
        if ours := our_key(cls, key.strip()):
            problems.append(Problem(f"{override} (command line): unknown key", f"Open-Sora's {key.strip()} is {ours}"))
            continue
        origin = f"command line, {describe(override)}"
        annotation = _annotation(cls, document.values, path)
        try:
            value = _parse(text, annotation, origin)
            _set(cls, document.values, path, value)
        except ConfigError as error:
            problems.append(Problem(error.message, error.hint))
            continue
        document.forget_origins(path)
        document.origins[path] = origin
        written.append(path)
    return written


def _parse(text: str, annotation: Any, origin: str) -> Any:
    """The value of an override. What is meant to be text needs no quotes, whatever it looks like."""
    try:
        value = parse_value(text, name=origin)
    except ConfigError as error:
        if str in members(annotation):
            return text
        raise ConfigError(error.message, hint="""quote it twice: 'key="a: b"'""") from error
    if str in members(annotation) and not (isinstance(value, str) or value is None):
        other = [member for member in members(annotation) if member not in (str, None)]
        if not any(type(value) is member for member in other):
            return text
    return value


def _annotation(cls: type, values: Any, path: KeyPath) -> Any:
    """The type that the config has at a key; `Any` where it has no such key."""
    annotation: Any = cls
    for part, container in zip(path, _containers(values, path), strict=True):
        annotation = _inner(annotation, part, container)
    return annotation


def _containers(values: Any, path: KeyPath) -> Iterator[Any]:
    """What the document holds on the way to a key: the root first, `None` from where it holds nothing."""
    for part in path:
        yield values
        key = _find(values, part)
        values = None if key is None else values[key]


def _inner(annotation: Any, part: str, value: Any) -> Any:
    """The type of an item, given the type and the value of what contains it."""
    for member in members(annotation):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if isinstance(member, type) and settings_classes(member):
            if part not in field_types(member):
                return Any
            inner = field_types(member)[part]
            if settings_classes(inner):
                chosen = select_class(member, part, value.get(part) if isinstance(value, dict) else None)
                return chosen if chosen is not None else Any
            return inner
        if origin is dict:
            return arguments[1]
        if origin is tuple and part.isdecimal():
            if len(arguments) == 2 and arguments[1] is Ellipsis:
                return arguments[0]
            return arguments[int(part)] if int(part) < len(arguments) else Any
    return Any


def _find(container: Any, part: str) -> Any:
    """The key or position in a container that `part` names; `None` when there is none."""
    if isinstance(container, dict):
        return next((key for key in container if str(key) == part), None)
    if isinstance(container, list | tuple) and part.isdecimal() and len(part) < 10 and int(part) < len(container):
        return int(part)
    return None


def _set(cls: type, values: dict[Any, Any], path: KeyPath, value: Any) -> None:
    """Write a value; containers on the way are made, starting from the config's defaults."""
    container: Any = values
    annotation: Any = cls
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        inner = _inner(annotation, part, container)
        key = _find(container, part)
        if last:
            item = value
        else:
            item = container[key] if key is not None else None
            if item is None:
                item = _default(annotation, part, inner)
            if isinstance(item, tuple):
                item = list(item)
            if not isinstance(item, dict | list):
                outer = ".".join(path[: depth + 1])
                raise ConfigError(
                    f"{'.'.join(path)}={describe(value)}: {outer} is {describe(item)}, which has no items",
                    hint=f"replace it as a whole: {outer}=…",
                )
        if isinstance(container, dict):
            container[part if key is None else key] = item
        elif key is not None:
            container[key] = item
        elif part.isdecimal() and len(part) < 10 and int(part) == len(container):
            container.append(item)
        else:
            appends = _inner(annotation, str(len(container)), container) is not Any
            raise ConfigError(
                f"{'.'.join(path)}={describe(value)}: {'.'.join(path[:depth])} has {len(container)} items",
                hint="positions start at 0" + (f"; {len(container)} appends" if appends else ""),
            )
        container, annotation = item, inner


def _default(annotation: Any, part: str, inner: Any) -> Any:
    """What a missing list or mapping starts from."""
    default: Any = MISSING
    if isinstance(annotation, type) and settings_classes(annotation) and part in field_types(annotation):
        default = field_default(annotation, part)
    if isinstance(default, tuple):
        return list(default)
    if isinstance(default, dict):
        return {**default}
    if default is None and not any(
        typing.get_origin(member) is dict or settings_classes(member) for member in members(inner)
    ):
        return [] if any(typing.get_origin(member) is tuple for member in members(inner)) else {}
    return {}
