"""The kinds of our API by every name that people use for them."""

from __future__ import annotations

from opensora_operator.api import KINDS, Kind
from opensora_operator.constants import API_VERSION

from osctl.client import Resource
from osctl.errors import UsageError


def resource_of(kind: Kind) -> Resource:
    """A kind as the API server has it."""
    return Resource(API_VERSION, kind.plural, kind.name, kind.namespaced)


def find_kind(word: str) -> Kind:
    """The kind of this name: `TrainingRun`, `trainingruns`, `tr`, … Raises UsageError."""
    lower = word.lower().removesuffix(".opensora.dev")
    for kind in KINDS:
        if lower in (kind.plural, kind.singular, *kind.short_names):
            return kind
    names = ", ".join(f"{kind.plural} ({kind.short_names[0]})" for kind in KINDS)
    raise UsageError(f"there is no kind {word!r}", hint=f"kinds are {names}; `osctl get tr {word}` asks for one run")
