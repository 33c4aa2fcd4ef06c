"""What the runtime asks of a kind: what to look up, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opensora_operator import planner, sample_planner, search_planner
from opensora_operator.observation import Observation
from opensora_operator.plans import Needs, Object, Plan

PROFILES = ("TrainingProfile", "ClusterTrainingProfile")
"""Kinds that are looked up and never planned."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How objects of one kind are planned; both functions are pure."""

    needs: Callable[[Object], Needs]
    plan: Callable[[Observation], Plan]


KINDS: Mapping[str, Kind] = {
    planner.KIND: Kind(needs=planner.needs, plan=planner.plan),
    sample_planner.KIND: Kind(needs=sample_planner.needs, plan=sample_planner.plan),
    search_planner.KIND: Kind(needs=search_planner.needs, plan=search_planner.plan),
}
"""The kinds that are reconciled."""
