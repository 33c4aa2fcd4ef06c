"""Between the API's classes and what the API server stores: camel case names, RFC 3339 times, and nothing for None.

A reconcile pass converts a few hundred fields, so each class is looked at once and becomes a list of small functions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from opensora_operator.fields import (
    QuantityMarker,
    TimeMarker,
    fields_of,
    is_int_or_text,
    split,
    unwrap_optional,
    words_of,
)

T = TypeVar("T")
Convert = Callable[[Any], Any]


class WireError(ValueError):
    """A value that the class has no place for."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.problem = problem
        self.path = path
        """Where, for example `spec.config.overrides[2]`."""

    def below(self, key: str) -> WireError:
        """The same one level up."""
        joint = "." if self.path and not self.path.startswith("[") else ""
        return WireError(self.problem, f"{key}{joint}{self.path}")


def to_wire(value: Any) -> dict[str, Any]:
    """An object of the API as plain JSON values. What is None, and empty lists and maps, are left out."""
    plain: dict[str, Any] = {}
    cls: type = type(value)
    for name, wire_name, encode, is_required in _encoders(cls):
        item = getattr(value, name)
        if item is not None and (is_required or (item != () and item != {})):
            plain[wire_name] = encode(item) if encode is not None else item
    return plain


def from_wire(cls: type[T], value: Any, *, path: str = "") -> T:
    """An object of the API from plain JSON values. Unknown keys are ignored; what is missing or null has its default.

    Bounds and patterns are the API server's to check.

    Args:
        cls: a class of `api.py`.
        value: what the API server stores.
        path: what error messages put before the names of fields.

    Raises:
        WireError: a required value is missing, or a value has the wrong type.
    """
    kind: type = cls
    try:
        converted: T = _decode_object(kind)(value)
    except WireError as error:
        raise (error.below(path) if path else error) from None
    return converted


def format_time(seconds: float) -> str:
    """Seconds since 1970 as RFC 3339, in whole seconds."""
    return datetime.fromtimestamp(math.floor(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


# ------------------------------------------------------------------------------------------------------------- writing


@functools.cache
def _encoders(cls: type) -> tuple[tuple[str, str, Convert | None, bool], ...]:
    return tuple(
        (info.name, info.wire_name, _encoder(info.hint, info.markers), info.is_required) for info in fields_of(cls)
    )


def _encoder(hint: Any, markers: tuple[Any, ...]) -> Convert | None:
    """What makes a plain value; None where the value is plain already."""
    hint, markers = unwrap_optional(hint, markers)
    if dataclasses.is_dataclass(hint):
        return to_wire
    if any(isinstance(marker, TimeMarker) for marker in markers):
        return format_time
    if typing.get_origin(hint) is tuple:
        encode = _encoder(*split(typing.get_args(hint)[0]))
        return (lambda items: [encode(item) for item in items]) if encode is not None else list
    if typing.get_origin(hint) is dict:
        assert _encoder(*split(typing.get_args(hint)[1])) is None, "maps have plain values"
        return dict
    return None


# ------------------------------------------------------------------------------------------------------------- reading


@functools.cache
def _decode_object(cls: type) -> Convert:
    fields = tuple((info.name, info.wire_name, _decoder(info.hint, info.markers)) for info in fields_of(cls))
    required = tuple((info.name, info.wire_name) for info in fields_of(cls) if info.is_required)

    def decode(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise WireError(f"expected an object, found {_kind_of(value)}")
        given = {}
        for name, key, convert in fields:
            item = value.get(key)
            if item is not None:
                try:
                    given[name] = convert(item)
                except WireError as error:
                    raise error.below(key) from None
        for name, key in required:
            if name not in given:
                raise WireError("missing", key)
        return cls(**given)

    return decode


def _decoder(hint: Any, markers: tuple[Any, ...]) -> Convert:
    hint, markers = unwrap_optional(hint, markers)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _decode_object(hint)
    if any(isinstance(marker, TimeMarker) for marker in markers):
        return _decode_time
    if any(isinstance(marker, QuantityMarker) for marker in markers):
        return _decode_quantity
    if typing.get_origin(hint) is tuple:
        return functools.partial(_decode_list, _decoder(*split(typing.get_args(hint)[0])))
    if typing.get_origin(hint) is dict:
        return functools.partial(_decode_map, _decoder(*split(typing.get_args(hint)[1])))
    if typing.get_origin(hint) is Literal or is_int_or_text(hint):
        return functools.partial(_decode_word, words_of(hint), is_int_or_text(hint))
    return _SCALARS[hint]


def _decode_list(convert: Convert, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise WireError(f"expected a list, found {_kind_of(value)}")
    items = []
    for index, item in enumerate(value):
        try:
            items.append(convert(item))
        except WireError as error:
            raise error.below(f"[{index}]") from None
    return tuple(items)


def _decode_map(convert: Convert, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise WireError(f"expected an object, found {_kind_of(value)}")
    items = {}
    for key, item in value.items():
        try:
            items[key] = convert(item)
        except WireError as error:
            raise error.below(f"[{key}]") from None
    return items


def _decode_word(words: tuple[str, ...], takes_numbers: bool, value: Any) -> Any:
    if isinstance(value, str) and value in words:
        return value
    if takes_numbers and _is_int(value):
        return int(value)
    expected = ["a whole number"] * takes_numbers + [repr(word) for word in words]
    raise WireError(f"expected {' or '.join(expected)}, found {_shown(value)}")


def _decode_int(value: Any) -> int:
    if not _is_int(value):
        raise WireError(f"expected a whole number, found {_kind_of(value)}")
    return int(value)


def _decode_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WireError(f"expected a number, found {_kind_of(value)}")
    return float(value)


def _decode_text(value: Any) -> str:
    if not isinstance(value, str):
        raise WireError(f"expected text, found {_kind_of(value)}")
    return value


def _decode_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise WireError(f"expected true or false, found {_kind_of(value)}")
    return value


def _decode_quantity(value: Any) -> str:
    return str(int(value)) if _is_int(value) else _decode_text(value)


def _decode_time(value: Any) -> float:
    try:
        return parse_time(value)
    except (ValueError, AttributeError):
        raise WireError(f"expected a time such as 2026-01-31T12:00:00Z, found {_shown(value)}") from None


_SCALARS: dict[Any, Convert] = {int: _decode_int, float: _decode_float, str: _decode_text, bool: _decode_bool}


def _is_int(value: Any) -> bool:
    """Whether it is a whole number; JSON has one type for all numbers, so 3.0 is one."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", type(None): "nothing"}
    return names.get(type(value)) or _shown(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
