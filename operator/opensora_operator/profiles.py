"""What an object takes over from its profile."""

from __future__ import annotations

from collections.abc import Iterable

from opensora_operator.api import ProfileRef, TrainingProfileSpec
from opensora_operator.plans import Key, Object
from opensora_operator.pod_template import PodTemplate
from opensora_operator.resources import parse_quantity


def profile_key(ref: ProfileRef | None, namespace: str) -> Key | None:
    """Where a profile is; None where none is named."""
    return None if ref is None else Key(ref.kind, namespace if ref.kind == "TrainingProfile" else "", ref.name)


def default_profile(profiles: Iterable[Object], namespace: str) -> Object | None:
    """The profile for objects that name none: of the namespace, or else of the cluster; the first by name."""
    found = [
        (not place, profile["metadata"]["name"], profile)
        for profile in profiles
        if (place := profile["metadata"].get("namespace", "")) in (namespace, "")
        and (profile.get("spec") or {}).get("default")
    ]
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def procs_per_node(given: int | str, profile: TrainingProfileSpec, template: PodTemplate) -> int:
    """Ranks per pod. `auto` is the profile's number, else one for each accelerator that the pod asks for."""
    chosen = given if given != "auto" else profile.procs_per_node
    if isinstance(chosen, int):
        return chosen
    resource = profile.accelerator.resource
    limit = {**profile.pod_template.resources.limits, **template.resources.limits}.get(resource)
    return max(1, int(parse_quantity(limit)) if limit is not None else profile.accelerator.count)
