"""From the API's classes to OpenAPI v3 schemas as CustomResourceDefinitions take them: structural, and all bounded."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal

from opensora_operator.fields import (
    Bounds,
    FieldInfo,
    Immutable,
    Length,
    MapKey,
    MaxItems,
    Pattern,
    QuantityMarker,
    Rule,
    TimeMarker,
    docs_of,
    fields_of,
    is_int_or_text,
    is_optional,
    rules_of,
    split,
    unwrap_optional,
    words_of,
)
from opensora_operator.wire import to_wire

Schema = dict[str, Any]

_TIME_LENGTH = 40
_INT_OR_TEXT = [{"type": "integer"}, {"type": "string"}]


def object_schema(cls: type, *, with_defaults: bool = True) -> Schema:
    """The schema of a class.

    Args:
        cls: a class of `api.py`.
        with_defaults: whether the API server fills in defaults: in a spec, which people write, not in a status.
    """
    docs = docs_of(cls)
    infos = fields_of(cls)
    schema: Schema = {
        "type": "object",
        "properties": {info.wire_name: _field_schema(info, docs[info.name], with_defaults) for info in infos},
    }
    required = [info.wire_name for info in infos if info.is_required]
    if required:
        schema["required"] = required
    changes = [
        Rule(_unchanged(info.wire_name), marker.message, field=info.wire_name)
        for info in infos
        for marker in info.markers
        if isinstance(marker, Immutable) and is_optional(info.hint)
    ]
    add_rules(schema, [*rules_of(cls), *changes])
    return schema


def _field_schema(info: FieldInfo, doc: str, with_defaults: bool) -> Schema:
    hint, markers = unwrap_optional(info.hint, info.markers)
    schema = {"description": doc, **_value_schema(hint, markers, with_defaults=with_defaults)}
    if with_defaults and not info.is_required:
        if is_optional(info.hint):
            assert info.default is None, f"{info.name}: null and a default would be two words for the same"
        elif dataclasses.is_dataclass(hint):
            schema["default"] = to_wire(
                info.default
            )  # in full: rules see a default before its own defaults are filled in
        elif info.default not in ((), {}):
            schema["default"] = info.default
    if not is_optional(info.hint):
        changes = [marker for marker in markers if isinstance(marker, Immutable)]
        add_rules(schema, [Rule("self == oldSelf", marker.message) for marker in changes])
    return schema


def _value_schema(hint: Any, markers: tuple[Any, ...], *, with_defaults: bool) -> Schema:
    rules = [marker for marker in markers if isinstance(marker, Rule)]
    schema: Schema
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        schema = object_schema(hint, with_defaults=with_defaults)
    elif typing.get_origin(hint) is tuple:
        # With defaults inside of items, `kubectl apply` of an unchanged file would always find the list changed.
        item = _value_schema(*split(typing.get_args(hint)[0]), with_defaults=False)
        schema = {"type": "array", "maxItems": _only(MaxItems, markers).le, "items": item, **_list_type(markers)}
    elif typing.get_origin(hint) is dict:
        value = _value_schema(*split(typing.get_args(hint)[1]), with_defaults=with_defaults)
        schema = {"type": "object", "maxProperties": _only(MaxItems, markers).le, "additionalProperties": value}
    else:
        schema, pattern_rules = _scalar_schema(hint, markers)
        rules = [*pattern_rules, *rules]
    add_rules(schema, rules)
    return schema


def _list_type(markers: tuple[Any, ...]) -> Schema:
    keys = [marker.field for marker in markers if isinstance(marker, MapKey)]
    if keys:
        return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": keys}
    return {"x-kubernetes-list-type": "atomic"}


def _scalar_schema(hint: Any, markers: tuple[Any, ...]) -> tuple[Schema, list[Rule]]:
    if any(isinstance(marker, TimeMarker) for marker in markers):
        return {"type": "string", "format": "date-time", "maxLength": _TIME_LENGTH}, []
    if any(isinstance(marker, QuantityMarker) for marker in markers):
        text = _text_limits(markers)
        return {"anyOf": _INT_OR_TEXT, "x-kubernetes-int-or-string": True, "minimum": 0, **text}, []
    if typing.get_origin(hint) is Literal:
        return {"type": "string", "enum": list(words_of(hint))}, []
    if is_int_or_text(hint):
        words = "|".join(words_of(hint))
        text = {"pattern": f"^({words})$", "maxLength": max(map(len, words_of(hint)))}
        return {"anyOf": _INT_OR_TEXT, "x-kubernetes-int-or-string": True, **_number_limits(markers), **text}, []
    if hint is bool:
        return {"type": "boolean"}, []
    if hint is int:
        return {"type": "integer", "format": "int64", **_number_limits(markers)}, []
    if hint is float:
        return {"type": "number", **_number_limits(markers)}, []
    assert hint is str, hint
    explained = [marker for marker in markers if isinstance(marker, Pattern) and marker.expected]
    # The API server's own message for a pattern is the pattern: a rule can say what is expected.
    rules = [
        Rule(f"self.matches({_cel(f'^({marker.regex})$')})", f"expected {marker.expected}") for marker in explained
    ]
    return {"type": "string", **_text_limits(tuple(marker for marker in markers if marker not in explained))}, rules


def _number_limits(markers: tuple[Any, ...]) -> Schema:
    bounds = _only(Bounds, markers)
    return {"minimum": bounds.ge, "maximum": bounds.le}


def _text_limits(markers: tuple[Any, ...]) -> Schema:
    length = _only(Length, markers)
    limits: Schema = {"minLength": length.ge} if length.ge else {}
    limits["maxLength"] = length.le
    patterns = [marker.regex for marker in markers if isinstance(marker, Pattern)]
    if patterns:
        limits["pattern"] = f"^({patterns[-1]})$"
    return limits


def _only(kind: type[Any], markers: tuple[Any, ...]) -> Any:
    """The marker of this kind, the outermost where there are several. Everything is bounded, so there is one."""
    found = [marker for marker in markers if isinstance(marker, kind)]
    assert found, f"{kind.__name__} is missing beside {markers}"
    return found[-1]


def add_rules(schema: Schema, rules: Sequence[Rule]) -> None:
    """Add rules to those of a schema."""
    if rules:
        schema.setdefault("x-kubernetes-validations", []).extend(map(_validation, rules))


def _validation(rule: Rule) -> Schema:
    validation = {"rule": rule.cel, "message": rule.message}
    if rule.message_expression is not None:
        validation["messageExpression"] = rule.message_expression
    if rule.field is not None:
        validation["fieldPath"] = f".{rule.field}"
    return validation


def _unchanged(name: str) -> str:
    """A rule on an optional field itself would let it be added and removed."""
    return f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"


def _cel(text: str) -> str:
    """A text as CEL writes it, with its backslashes as they are."""
    assert "'" not in text
    return f"r'{text}'"
