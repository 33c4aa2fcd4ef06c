"""What a type hint of the API cannot say by itself: bounds, rules and names on the wire, and how they are read back.

A field is `name: Annotated[type, marker, …] = default`, followed by the string that describes it. Nothing else
describes the API: schema, defaults, documentation and conversion are all made from this.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import itertools
import sys
import types
import typing
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest value of a number."""

    ge: float
    le: float


@dataclass(frozen=True)
class Length:
    """Shortest and longest length of a text, in characters."""

    ge: int
    le: int


@dataclass(frozen=True)
class MaxItems:
    """Largest number of items of a list, or of entries of a map."""

    le: int


@dataclass(frozen=True)
class Pattern:
    """A regular expression (RE2) that the whole of a text matches."""

    regex: str
    expected: str = ""
    """What a user reads who breaks it, where the expression does not speak for itself."""


@dataclass(frozen=True)
class MapKey:
    """A list of objects of which no two share this field: patches merge it item by item."""

    field: str


@dataclass(frozen=True)
class WireName:
    """The name on the wire, where it is not the camel case of the Python name."""

    name: str


@dataclass(frozen=True)
class Immutable:
    """The value can be set when the object is made, and never changed."""

    message: str


@dataclass(frozen=True)
class Rule:
    """A CEL rule over a class (in its `rules`) or a field, and what a user reads who breaks it."""

    cel: str
    message: str
    message_expression: str | None = None
    """CEL that makes the message, where it names the value; `message` stands in where that fails."""
    field: str | None = None
    """Name on the wire of the field that a rule over a class is about."""


class TimeMarker:
    """Seconds since 1970 in Python, RFC 3339 on the wire."""


class QuantityMarker:
    """Kubernetes' quantity: `500m`, `16Gi`, or a whole number."""


Time = Annotated[float, TimeMarker()]
Quantity = Annotated[
    str,
    QuantityMarker(),
    Length(1, 32),
    Pattern("([0-9]+(\\.[0-9]*)?|\\.[0-9]+)([KMGTPE]i|[numkMGTPE]|e[-+]?[0-9]+)?"),
]


@dataclass(frozen=True, kw_only=True)
class FieldInfo:
    """One field of an API class."""

    name: str
    wire_name: str
    hint: Any
    """The type, without its markers."""
    markers: tuple[Any, ...]
    default: Any
    """`MISSING` where the field is required."""

    @property
    def is_required(self) -> bool:
        return self.default is MISSING


@functools.cache
def fields_of(cls: type) -> tuple[FieldInfo, ...]:
    """The fields of an API class, in their order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found: list[FieldInfo] = []
    for field in dataclasses.fields(cls):
        hint, markers = split(hints[field.name])
        renamed = [marker.name for marker in markers if isinstance(marker, WireName)]
        found.append(
            FieldInfo(
                name=field.name,
                wire_name=renamed[0] if renamed else camel_case(field.name),
                hint=hint,
                markers=markers,
                default=field.default_factory() if field.default_factory is not MISSING else field.default,
            )
        )
    return tuple(found)


def split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its markers, and the markers, the inner ones first."""
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def unwrap_optional(hint: Any, markers: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Of `X | None` the X, with the markers of both."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, markers
    some = [member for member in typing.get_args(hint) if member is not types.NoneType]
    if len(some) != 1:
        return typing.Union[tuple(some)], markers  # noqa: UP007  # built at run time
    inner, inner_markers = split(some[0])
    return inner, (*inner_markers, *markers)


def is_optional(hint: Any) -> bool:
    """Whether None stands for "not given"."""
    return types.NoneType in typing.get_args(hint)


def is_int_or_text(hint: Any) -> bool:
    """Whether the type is `int | Literal[…]`, such as a number or "auto"."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union) and int in typing.get_args(hint)


def words_of(hint: Any) -> tuple[str, ...]:
    """The words of `int | Literal[…]`, or of a Literal."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(word for member in typing.get_args(hint) for word in words_of(member))


def rules_of(cls: type) -> tuple[Rule, ...]:
    """The rules over a class as a whole."""
    rules: tuple[Rule, ...] = getattr(cls, "rules", ())
    return rules


def camel_case(name: str) -> str:
    """`run_uri` → `runUri`."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def docs_of(cls: type) -> dict[str, str]:
    """Field or member name → the string below it, of a dataclass and what it inherits from, or of an enum."""
    docs: dict[str, str] = {}
    is_enum = issubclass(cls, enum.Enum)
    bases = [cls] if is_enum else [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    for base in reversed(bases):
        body = _classes(sys.modules[base.__module__])[base.__name__].body
        for statement, following in itertools.pairwise(body):
            target: ast.expr | None = None
            if isinstance(statement, ast.AnnAssign):
                target = statement.target
            elif is_enum and isinstance(statement, ast.Assign):
                target = statement.targets[0]
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(target, ast.Name) and isinstance(text, ast.Constant):
                docs[target.id] = " ".join(str(text.value).split())
    return docs


@functools.cache
def _classes(module: types.ModuleType) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(module))
    return {statement.name: statement for statement in tree.body if isinstance(statement, ast.ClassDef)}
