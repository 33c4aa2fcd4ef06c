"""What planners are shown: an object and everything around it, at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from opensora_operator.plans import Child, Key, Object
from opensora_operator.progress import ProgressReport
from opensora_operator.resources import Platform
from opensora_operator.views import JobView, PodView


@dataclass(frozen=True, kw_only=True)
class Observation:
    """All that is known of an object when it is planned."""

    now: float
    """Seconds since 1970."""
    body: Object
    """The object itself."""
    jobs: tuple[JobView, ...] = ()
    """By the object's UID."""
    pods: tuple[PodView, ...] = ()
    """The same."""
    objects: Mapping[Key, Object | None] = field(default_factory=dict)
    """Those of `Needs.objects`; None where there is none."""
    default_profile: Object | None = None
    """Where `Needs.default_profile` asks for it: the default profile of the namespace, or else of the cluster."""
    config_maps: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict)
    """Those of `Needs.config_maps`; None where there is none."""
    children: Mapping[tuple[str, str], Child] = field(default_factory=dict)
    """Those of `Needs.children` that exist, and what stood in the way of a Create: (kind, name) → whose it is."""
    dead_nodes: frozenset[str] = frozenset()
    """Nodes of pods stuck in deletion that are gone or not ready."""
    progress: ProgressReport | None = None
    """The newest report of the current attempt; None where there is none."""
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Name of an object → why the API server refuses to have it."""
    platform: Platform = field(default_factory=Platform)
