"""`osctl explain`: fields of run files and of configs, from what defines them."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from opensora_operator.api import KINDS, TRAINING_RUN

from osctl.errors import ExitCode, OsctlError
from osctl.output import terminal_width
from osctl.session import Session
from osctl.validation import schema_of

_LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "minLength": "characters, at least",
    "maxLength": "characters, at most",
    "maxItems": "items, at most",
    "maxProperties": "entries, at most",
    "pattern": "matches",
}


def explain(
    session: Session,
    field: Annotated[
        str, typer.Argument(metavar="[FIELD]", help="Path of the field; a TrainingRun as a whole unless given.")
    ] = "tr",
) -> None:
    """Describe a field of a run file or a config.

    Of a run file: `tr.spec.checkpoint`, or without the kind `spec.nodes`. Of a config: `config.train.steps`.

    Examples: `osctl explain spec`, `osctl explain sj.spec.prompts`, `osctl explain config.optim`.
    """
    first, *rest = field.split(".")
    if first == "config":
        session.output.data(_describe_config(".".join(rest)))
        return
    kind = next(
        (kind for kind in KINDS if first.lower() in (kind.singular, kind.plural, *kind.short_names)), TRAINING_RUN
    )
    path = rest if first.lower() in (kind.singular, kind.plural, *kind.short_names) else [first, *rest]
    session.output.data(_describe(kind.name, schema_of(kind.name), path))


def _describe(kind: str, schema: Mapping[str, Any], path: list[str]) -> str:
    place = kind
    for name in path:
        inner = schema.get("items") or schema
        known: Mapping[str, Any] = inner.get("properties") or {}
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            names = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'no fields'}"
            raise OsctlError(f"{place} has no field {name!r}", hint=names, exit_code=ExitCode.NOT_FOUND)
        schema, place = known[name], f"{place}.{name}"
    description = textwrap.fill(
        str(schema.get("description", "")),
        width=max(40, terminal_width()),
        break_on_hyphens=False,
        break_long_words=False,
    )
    lines = [f"{place} ({_type(schema)})", "", description, ""]
    facts = [(words, str(schema[key])) for key, words in _LIMITS.items() if key in schema]
    if "enum" in schema:
        facts.append(("one of", ", ".join(schema["enum"])))
    if "default" in schema and not isinstance(schema["default"], dict):
        facts.append(("default", str(schema["default"])))
    lines += [f"{words} {value}" for words, value in facts]
    lines += [f"rule: {rule['message']}" for rule in schema.get("x-kubernetes-validations") or ()]
    inner = schema.get("items") or schema
    required = inner.get("required") or ()
    entries = [
        _entry(name, _type(entry) + _needed(entry, is_required=name in required), str(entry.get("description", "")))
        for name, entry in (inner.get("properties") or {}).items()
    ]
    return "\n".join([*lines, *([""] if lines[-1] and entries else []), *entries]).rstrip()


def _needed(schema: Mapping[str, Any], *, is_required: bool) -> str:
    default = schema.get("default")
    if is_required:
        return ", required"
    return "" if default in (None, "", [], {}) or isinstance(default, dict) else f", default {json.dumps(default)}"


def _entry(name: str, kind: str, doc: str) -> str:
    """A field with its description below it, as wide as the terminal."""
    indent = " " * 6
    text = textwrap.fill(
        doc,
        width=max(40, terminal_width()),
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return f"  {name} ({kind})\n{text}"


def _type(schema: Mapping[str, Any]) -> str:
    if schema.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items') or {})}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"map of {_type(schema['additionalProperties'])}"
    return str(schema.get("type", "object"))


def _describe_config(key: str) -> str:
    from opensora.config.describe import sections_of  # slow to import
    from opensora.config.train import TrainConfig

    settings = [setting for section in sections_of(TrainConfig) for setting in section.settings]
    found = [setting for setting in settings if not key or setting.key == key or setting.key.startswith(f"{key}.")]
    if not found:
        close = difflib.get_close_matches(key, [setting.key for setting in settings], n=1)
        hint = f"did you mean config.{close[0]}?" if close else "`osctl explain config` lists all settings"
        raise OsctlError(f"configs have no setting {key!r}", hint=hint, exit_code=ExitCode.NOT_FOUND)
    return "\n".join(_entry(f"{entry.key} = {entry.default}", entry.type, entry.doc) for entry in found)
