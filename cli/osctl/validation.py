"""A manifest against the schema of its kind, as the API server checks it: types, bounds, unknown fields, CEL rules."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from opensora_operator.api import KINDS
from opensora_operator.crd import crd
from opensora_operator.schema import Schema

from osctl.cel import CelError, compile_rule
from osctl.client import Object

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_MAX_SHOWN = 60


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a manifest."""

    field: str
    """For example `spec.nodes`; empty for the whole."""
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


@cache
def schema_of(kind: str) -> Schema:
    """The schema of a kind, as its CustomResourceDefinition has it."""
    known = next(known for known in KINDS if known.name == kind)
    schema: Schema = crd(known)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def validate(body: Object) -> list[Problem]:
    """What the API server would refuse in a new object of one of our kinds. Empty where it would take it.

    CEL rules are tried where the rest is right: they rely on it.
    """
    schema = schema_of(body["kind"])
    own = {**schema, "properties": {key: value for key, value in schema["properties"].items() if key != "metadata"}}
    given = copy.deepcopy({key: value for key, value in body.items() if key not in ("metadata", "status")})
    problems = list(_check(given, own, ""))
    if not problems:
        whole = with_defaults(given, own) | {"metadata": body["metadata"]}
        problems = list(_check_rules(whole, {**own, "properties": {**own["properties"], "metadata": {}}}, ""))
    return problems


def with_defaults(value: Any, schema: Schema) -> Any:
    """A value with what the API server fills in."""
    if isinstance(value, dict):
        filled = dict(value)
        for key, inner in (schema.get("properties") or {}).items():
            if filled.get(key) is None:
                filled.pop(key, None)
                if "default" not in inner:
                    continue
                filled[key] = copy.deepcopy(inner["default"])
            filled[key] = with_defaults(filled[key], inner)
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict):
            filled = {key: with_defaults(item, extra) for key, item in filled.items()}
        return filled
    if isinstance(value, list) and "items" in schema:
        return [with_defaults(item, schema["items"]) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------------- the form


def _check(value: Any, schema: Schema, path: str) -> Iterator[Problem]:
    if schema.get("x-kubernetes-preserve-unknown-fields") and "type" not in schema:
        return
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield Problem(path, f"{_shown(value)} is neither a whole number nor a text")
            return
    elif "type" in schema and not _has_type(value, schema["type"]):
        yield Problem(path, f"{_shown(value)} is no {schema['type']}")
        return
    if isinstance(value, dict):
        yield from _check_object(value, schema, path)
    elif isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            yield Problem(path, f"{len(value)} items are more than {schema['maxItems']}")
        for index, item in enumerate(value):
            yield from _check(item, schema.get("items") or {}, f"{path}[{index}]")
    elif isinstance(value, str):
        yield from _check_text(value, schema, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value):
            yield Problem(path, f"{value} is below {schema['minimum']}")
        if value > schema.get("maximum", value):
            yield Problem(path, f"{value} is above {schema['maximum']}")


def _has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _check_object(value: Mapping[str, Any], schema: Schema, path: str) -> Iterator[Problem]:
    known, extra = schema.get("properties") or {}, schema.get("additionalProperties")
    for key in schema.get("required") or ():
        if value.get(key) is None:
            yield Problem(_below(path, key), "it is missing")
    if len(value) > schema.get("maxProperties", len(value)):
        yield Problem(path, f"{len(value)} entries are more than {schema['maxProperties']}")
    for key, item in value.items():
        inner = known.get(key, extra)
        if not isinstance(inner, dict):
            if not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield Problem(_below(path, str(key)), _unknown(str(key), known))
        elif item is not None:  # null is as if it were not there
            yield from _check(item, inner, _below(path, str(key)))


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    import difflib  # only where something is wrong

    close = difflib.get_close_matches(key, known, n=1)
    return "there is no such field" + (f"; {close[0]} is near" if close else "")


def _check_text(value: str, schema: Schema, path: str) -> Iterator[Problem]:
    if "enum" in schema and value not in schema["enum"]:
        yield Problem(path, f"{_shown(value)} is none of {', '.join(map(repr, schema['enum']))}")
    if len(value) > schema.get("maxLength", len(value)):
        yield Problem(path, f"{len(value)} characters are more than {schema['maxLength']}")
    if len(value) < schema.get("minLength", 0):
        yield Problem(path, f"{len(value)} characters are fewer than {schema['minLength']}")
    pattern = schema.get("pattern")
    if pattern is not None and re.search(_without_newline(pattern), value) is None:
        yield Problem(path, f"{_shown(value)} does not match {pattern}")


def _without_newline(pattern: str) -> str:
    """Go's `$` is the end of the text; Python's also takes a line break before it."""
    return pattern[:-1] + r"\Z" if pattern.endswith("$") and not pattern.endswith("\\$") else pattern


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# --------------------------------------------------------------------------------------------------------- the rules


def _check_rules(value: Any, schema: Schema, path: str) -> Iterator[Problem]:
    for rule in schema.get("x-kubernetes-validations") or ():
        if "oldSelf" not in rule["rule"]:  # those are about changes of what exists
            yield from _check_rule(value, rule, path)
    if isinstance(value, dict):
        known, extra = schema.get("properties") or {}, schema.get("additionalProperties")
        for key, item in value.items():
            inner = known.get(key, extra)
            if isinstance(inner, dict):
                yield from _check_rules(item, inner, _below(path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _check_rules(item, schema.get("items") or {}, f"{path}[{index}]")


def _check_rule(value: Any, rule: Mapping[str, str], path: str) -> Iterator[Problem]:
    scope = {"self": value}
    field = path + rule.get("fieldPath", "")
    try:
        if compile_rule(rule["rule"])(scope):
            return
        message = rule["message"]
    except (CelError, TypeError, ValueError) as error:
        message = f"{rule['message']} ({error})"
    if "messageExpression" in rule:
        try:
            message = str(compile_rule(rule["messageExpression"])(scope))
        except (CelError, TypeError, ValueError):
            message = rule["message"]
    yield Problem(field.lstrip("."), message)
