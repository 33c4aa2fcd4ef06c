"""The reference page of the API, in Markdown: every field of every kind, with type, default, bounds and description."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator
from typing import Any, Literal

from opensora_operator.api import KINDS, NAME_RULE, Kind
from opensora_operator.constants import API_VERSION
from opensora_operator.fields import (
    Bounds,
    FieldInfo,
    Immutable,
    Length,
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


def api_page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION, *(_kind_section(kind) for kind in KINDS), _PARTS]
    specs, statuses = [kind.spec for kind in KINDS], [kind.status for kind in KINDS if kind.status is not None]
    of_specs = _parts_of(specs)
    parts += [_class_section(cls, with_defaults=cls in of_specs) for cls in _parts_of([*specs, *statuses])]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _kind_section(kind: Kind) -> str:
    names = ", ".join(f"`{name}`" for name in (kind.plural, kind.singular, *kind.short_names))
    scope = "in a namespace" if kind.namespaced else "for the whole cluster"
    text = [f"## {kind.name}\n", f"{kind.doc} It lives {scope}; `kubectl` knows it as {names}.\n"]
    if kind.status is not None:
        text.append(f"`{NAME_RULE.field}` has {NAME_RULE.message}.\n")
    text += [f"### {kind.name}: `spec`\n", _description(kind.spec), _table(kind.spec, with_defaults=True)]
    if kind.status is not None:
        text += [f"### {kind.name}: `status`\n", _description(kind.status), _table(kind.status, with_defaults=False)]
    return "\n".join(text)


def _class_section(cls: type, *, with_defaults: bool) -> str:
    return "\n".join([f"### {cls.__name__}\n", _description(cls), _table(cls, with_defaults=with_defaults)])


def _description(cls: type) -> str:
    lines = [inspect.cleandoc(cls.__doc__ or ""), ""]
    rules = [rule.message for rule in rules_of(cls)]
    if rules:
        lines += ["What breaks a rule is refused, with these words:", ""]
        lines += [f"- {message}" for message in rules] + [""]
    return "\n".join(lines)


def _table(cls: type, *, with_defaults: bool) -> str:
    docs = docs_of(cls)
    rows = ["| field | type | default | bounds | meaning |", "| --- | --- | --- | --- | --- |"]
    for info in fields_of(cls):
        hint, markers = unwrap_optional(info.hint, info.markers)
        cells = (
            f"`{info.wire_name}`",
            _type_text(hint, markers),
            _default_text(info, hint) if with_defaults else "",
            "; ".join(_bounds(hint, markers)),
            docs[info.name] + ("" if not _is_immutable(markers) else " Cannot be changed."),
        )
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _type_text(hint: Any, markers: tuple[Any, ...]) -> str:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    if typing.get_origin(hint) is tuple:
        return f"list of {_type_text(*split(typing.get_args(hint)[0]))}"
    if typing.get_origin(hint) is dict:
        return f"map to {_type_text(*split(typing.get_args(hint)[1]))}"
    if any(isinstance(marker, TimeMarker) for marker in markers):
        return "time"
    if any(isinstance(marker, QuantityMarker) for marker in markers):
        return "quantity"
    words = [f'`"{word}"`' if word == "" else f"`{word}`" for word in words_of(hint)]
    if is_int_or_text(hint):
        return " or ".join(["whole number", *words])
    if typing.get_origin(hint) is Literal:
        return " or ".join(words)
    names: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names[hint]


def _default_text(info: FieldInfo, hint: Any) -> str:
    if info.is_required:
        return "**required**"
    if is_optional(info.hint) or dataclasses.is_dataclass(hint) or info.default in ((), {}):
        return ""
    return f"`{json.dumps(info.default) if not isinstance(info.default, str) or not info.default else info.default}`"


def _bounds(hint: Any, markers: tuple[Any, ...]) -> Iterator[str]:
    is_text = not any(isinstance(marker, QuantityMarker | TimeMarker) for marker in markers)
    for marker in markers:
        match marker:
            case Bounds():
                yield f"{_number(marker.ge)} to {_number(marker.le)}" if marker.le < 2**53 else f"{marker.ge} or more"
            case MaxItems():
                yield f"at most {marker.le} {'items' if typing.get_origin(hint) is tuple else 'entries'}"
            case Length() if is_text:
                yield f"{marker.ge} to {marker.le} characters" if marker.ge else f"at most {marker.le} characters"
            case Pattern() if is_text:
                yield marker.expected or f"matches `{marker.regex}`"
            case Rule():
                yield marker.message
    if typing.get_origin(hint) in (tuple, dict):
        inner, inner_markers = split(typing.get_args(hint)[0 if typing.get_origin(hint) is tuple else 1])
        if not dataclasses.is_dataclass(inner):
            yield from (f"each {text}" for text in _bounds(inner, inner_markers))


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def _is_immutable(markers: tuple[Any, ...]) -> bool:
    return any(isinstance(marker, Immutable) for marker in markers)


def _parts_of(tops: list[type]) -> list[type]:
    """Every class that these are made of, each before those that it is made of."""
    found: dict[type, None] = {}
    for top in tops:
        _collect(top, found)
    return [cls for cls in found if cls not in tops]


def _collect(cls: type, found: dict[type, None]) -> None:
    if cls in found:
        return
    found[cls] = None
    for info in fields_of(cls):
        hint, _ = unwrap_optional(info.hint, info.markers)
        while typing.get_origin(hint) in (tuple, dict):
            hint, _ = split(typing.get_args(hint)[0 if typing.get_origin(hint) is tuple else 1])
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            _collect(hint, found)


_INTRODUCTION = f"""\
# The API of the operator

Every field of every kind of `{API_VERSION}`, with its type, default and bounds. All kinds are in the category `os`:
`kubectl get os` lists them.

<!-- Written by `python -m opensora_operator.crd`. Edit operator/opensora_operator/api.py instead. -->

```yaml
apiVersion: {API_VERSION}
kind: TrainingRun
metadata:
  name: first
spec:
  runUri: s3://bucket/runs/first
  image: registry.example.com/opensora:0.1.0
  config:
    file: /opt/opensora/configs/stdit3/train/quickstart.yaml
    overrides: [train.steps=100]
  nodes: 2
```

The API server fills in defaults and refuses what breaks a bound or a rule, with a message that names the field. An
unknown field is an error for `kubectl` and `osctl`; other clients ask for that with `fieldValidation=Strict`, or it is
dropped. A field without a default is optional unless it is marked as required; its meaning says what holds then.

A `time` is written as `2026-01-31T12:00:00Z`; a `quantity` as Kubernetes does, `500m` or `16Gi`.
"""

_PARTS = """\
## Parts

What the kinds above are made of.
"""
