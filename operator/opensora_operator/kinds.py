"""What the runtime asks of a kind: what to look up, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opensora_operator.plans import Child, Key, Needs, Object, Plan
from opensora_operator.views import JobView, PodView


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All that is known of an object when it is planned."""

    now: float
    """Seconds since 1970."""
    body: Object
    """The object itself."""
    jobs: tuple[JobView, ...]
    pods: tuple[PodView, ...]
    objects: Mapping[Key, Object | None]
    """Those of `Needs.objects`; None where there is none."""
    config_maps: Mapping[str, Mapping[str, str] | None]
    """Those of `Needs.config_maps`; None where there is none."""
    children: Mapping[tuple[str, str], Child]
    """Those of `Needs.children` that exist, and what stood in the way of a Create: (kind, name) → whose it is."""
    dead_nodes: frozenset[str]
    """Nodes of pods stuck in deletion that are gone or not ready."""
    progress: Any
    """The newest report of the current attempt; None where there is none."""
    rejected: Mapping[str, str]
    """Name of an object → why the API server refuses to have it."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How objects of one kind are planned; both functions are pure."""

    needs: Callable[[Object], Needs]
    plan: Callable[[Observation], Plan]


KINDS: Mapping[str, Kind] = {}
"""The kinds that are reconciled."""
