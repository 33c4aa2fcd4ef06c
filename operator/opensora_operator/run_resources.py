"""What an attempt of a TrainingRun is made from: its objects, or why there can be none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opensora_operator.api import (
    ProfileRef,
    ResolvedStatus,
    TrainingProfileSpec,
    TrainingRunSpec,
)
from opensora_operator.constants import GROUP
from opensora_operator.plans import Object
from opensora_operator.reasons import Reason
from opensora_operator.resources import (
    CA_KEY,
    CONFIG_FOLDER,
    CONFIG_KEY,
    TOKEN_FOLDER,
    Workload,
    config_map,
    gang_job,
    headless_service,
    isolation,
    parse_quantity,
    pod_group,
)
from opensora_operator.run_view import Run, job_name
from opensora_operator.status import State
from opensora_operator.topology import placement_of
from opensora_operator.wire import from_wire, to_wire


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The objects of the next attempt, in the order in which they are made."""

    objects: tuple[Object, ...]
    resolved: ResolvedStatus


def wanted_by(run: Run) -> Wanted | State:
    """The next attempt's objects; or why there can be none."""
    snapshot = _snapshot(run)
    if isinstance(snapshot, State):
        return snapshot
    profile, image, data, resolved = snapshot
    procs = resolved.procs_per_node or 1
    world_size = run.nodes * procs
    group = run.spec.parallelism.sequence or 1
    if world_size % group:
        return _refusal(
            f"spec.nodes x spec.procsPerNode = {run.nodes} x {procs} ranks do not divide by "
            f"parallelism.sequence = {group}"
        )
    configuration = config_map(run.object, data, component="trainer")
    placement = placement_of(run.spec, profile, run.object, attempt=run.attempt, nodes=run.nodes, procs=procs)
    name = job_name(run.name, run.attempt)
    workload = Workload(
        owner=run.object,
        component="trainer",
        attempt=run.attempt,
        image=image,
        profile=profile,
        template=run.spec.pod_template,
        command=("python", "-m", "opensora.launch"),
        args=_arguments(run, data, profile),
        env=_environment(run, name, procs),
        config_map=configuration["metadata"]["name"],
        grace_seconds=run.spec.termination_grace_period_seconds,
        storage_secret=_first(run.spec.storage.secret_ref, profile.storage.secret_ref, of="name"),
        endpoint=run.spec.storage.endpoint or profile.storage.endpoint,
        priority_class=run.spec.scheduling.priority_class_name or profile.scheduling.priority_class_name,
        service=run.name,
        avoid_nodes=run.status.avoid_nodes,
        token_audience=f"{GROUP}/{run.namespace}/{run.name}" if run.observed.platform.progress_url else None,
        topology=placement.pods,
    )
    objects = [configuration, headless_service(run.object)]
    if run.spec.network.policy == "Isolated":
        objects.append(isolation(run.object))
    if placement.pod_group_seconds is not None:
        seconds = placement.pod_group_seconds
        objects.append(pod_group(run.object, name, attempt=run.attempt, nodes=run.nodes, timeout_seconds=seconds))
    rank_zero = run.spec.success_policy == "RankZero"
    objects.append(gang_job(workload, name, nodes=run.nodes, queue=resolved.queue, rank_zero_decides=rank_zero))
    taken = _name_taken(run, objects)
    if taken is not None:
        return taken
    for manifest in objects:
        refusal = run.observed.rejected.get(manifest["metadata"]["name"])
        if refusal is not None:
            message = f"{manifest['kind']} {manifest['metadata']['name']}: {refusal}"
            return State(status=False, reason=Reason.REJECTED, message=message)
    names = replace(resolved, config_map=configuration["metadata"]["name"], world_size=world_size)
    return Wanted(objects=tuple(objects), resolved=names)


def _name_taken(run: Run, objects: Sequence[Object]) -> State | None:
    for manifest in objects:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        found = run.observed.children.get((kind, name))
        if found is not None and found.owner_uid != run.object["metadata"]["uid"]:
            message = f"the {kind} {name} in this namespace does not belong to this run"
            return State(status=False, reason=Reason.NAME_CONFLICT, message=message)
    return None


_Snapshot = tuple[TrainingProfileSpec, str, dict[str, str], ResolvedStatus]


def _snapshot(run: Run) -> _Snapshot | State:
    """Profile, image, files of the pods, and what status tells of them: read once, kept in the run's ConfigMap."""
    kept = run.status.resolved.config_map
    if kept is None:
        return _first_snapshot(run)
    child = run.observed.children.get(("ConfigMap", kept))
    if child is None:
        message = f"the ConfigMap {kept} with what this run was started with is gone"
        return State(status=False, reason=Reason.CONFIG_MISSING, message=message)
    data = dict(child.data)
    profile = from_wire(TrainingProfileSpec, json.loads(data["profile.json"]))
    resolved = run.status.resolved
    assert resolved.image is not None
    return profile, resolved.image, _with_authority(run, data), resolved


def _first_snapshot(run: Run) -> _Snapshot | State:
    spec, observed = run.spec, run.observed
    profile, source = TrainingProfileSpec(), run.profile
    if spec.profile_ref is not None and source is None:
        message = f"spec.profileRef: there is no {spec.profile_ref.kind} {spec.profile_ref.name}"
        return State(status=False, reason=Reason.PROFILE_NOT_FOUND, message=message)
    if source is not None:
        profile = from_wire(TrainingProfileSpec, source.get("spec") or {})
    image = spec.image or profile.image
    if image is None:
        return _refusal("spec.image is missing, and no profile gives one: name an image")
    for name, degree in (("tensor", spec.parallelism.tensor), ("pipeline", spec.parallelism.pipeline)):
        if (degree or 1) > 1:
            return _refusal(f"spec.parallelism.{name} = {degree}: the core has no {name} parallelism; leave it out")
    if spec.sampling.max_per_step is not None and spec.sampling.prompts_ref is None:
        return _refusal("spec.sampling.maxPerStep needs spec.sampling.promptsRef: the config's own prompts all count")
    data: dict[str, str] = {"profile.json": json.dumps(to_wire(profile), sort_keys=True)}
    if spec.config.inline is not None:
        data[CONFIG_KEY] = spec.config.inline
    for field_name, ref, key in (
        ("config.ref", spec.config.ref, CONFIG_KEY),
        ("sampling.promptsRef", spec.sampling.prompts_ref, "prompts.txt"),
    ):
        if ref is None:
            continue
        found = observed.config_maps.get(ref.config_map)
        if found is None or ref.key not in found:
            what = f"ConfigMap {ref.config_map}" if found is None else f"key {ref.key} in ConfigMap {ref.config_map}"
            return State(status=False, reason=Reason.CONFIG_MISSING, message=f"spec.{field_name}: there is no {what}")
        data[key] = found[ref.key]
    table = run.status.resolved.batch_table
    if spec.batch_table_ref is not None:
        if table is None:
            name = spec.batch_table_ref.name
            message = f"spec.batchTableRef: BatchSearch {name} has no table yet"
            return State(status=False, reason=Reason.CONFIG_MISSING, message=message)
        found = observed.config_maps.get(table)
        if found is None:
            message = f"spec.batchTableRef: the ConfigMap {table} of the table is missing"
            return State(status=False, reason=Reason.CONFIG_MISSING, message=message)
        data["batch-table.json"] = found["table.json"]
    resolved = ResolvedStatus(
        profile=None if source is None else ProfileRef(kind=source["kind"], name=source["metadata"]["name"]),
        profile_generation=None if source is None else source["metadata"].get("generation"),
        image=image,
        procs_per_node=_procs_per_node(run.spec, profile),
        queue=run.queue,
        batch_table=table,
    )
    return profile, image, _with_authority(run, data), resolved


def _with_authority(run: Run, data: dict[str, str]) -> dict[str, str]:
    """A new attempt trusts the authorities of now."""
    bundle = run.observed.platform.ca_bundle
    return data if bundle is None else {**data, CA_KEY: bundle}


def _procs_per_node(spec: TrainingRunSpec, profile: TrainingProfileSpec) -> int:
    given = spec.procs_per_node if spec.procs_per_node != "auto" else profile.procs_per_node
    if isinstance(given, int):
        return given
    resource = profile.accelerator.resource
    limit = {**profile.pod_template.resources.limits, **spec.pod_template.resources.limits}.get(resource)
    count = int(parse_quantity(limit)) if limit is not None else profile.accelerator.count
    return max(1, count)


def _refusal(message: str) -> State:
    return State(status=False, reason=Reason.INVALID_SPEC, message=message)


def _first(*options: Any, of: str) -> Any:
    return next((getattr(option, of) for option in options if option is not None), None)


def _arguments(run: Run, data: Mapping[str, str], profile: TrainingProfileSpec) -> tuple[str, ...]:
    """The command line of the core: its config, and what the spec says about it as overrides."""
    spec = run.spec
    config = spec.config.file or f"{CONFIG_FOLDER}/{CONFIG_KEY}"
    grace = spec.termination_grace_period_seconds
    budget = spec.checkpoint.sigterm_budget_seconds or max(1, grace - 30, grace // 2)
    cache, host = spec.data.cache, profile.host_cache
    cache_path = cache.path if cache is not None else host.mount_path if host is not None else None
    cache_limit = cache.size_limit if cache is not None else host.size_limit if host is not None else None
    overrides = {
        "run_uri": spec.run_uri,
        "checkpoint.stop_deadline_seconds": budget,
        "parallel.sequence": spec.parallelism.sequence,
        "data.path": spec.data.catalogue,
        "data.cache_dir": cache_path,
        "data.cache_gib": None if cache_limit is None else parse_quantity(cache_limit) / 2**30,
        "data.batch_table": f"{CONFIG_FOLDER}/batch-table.json" if "batch-table.json" in data else None,
        "checkpoint.every_steps": spec.checkpoint.every_steps,
        "checkpoint.keep_last": spec.checkpoint.keep_last,
        "checkpoint.keep_every_steps": spec.checkpoint.keep_every_steps,
        "samples.every_steps": spec.sampling.every_steps,
        "samples.prompts": _prompts(spec, data),
        "watchdog.factor": spec.watchdog.step_timeout_factor,
        "watchdog.floor_seconds": spec.watchdog.min_seconds,
    }
    given = [f"{key}={_value(value)}" for key, value in overrides.items() if value is not None]
    return (f"opensora.{spec.entrypoint}", config, *given, *spec.config.overrides)


def _prompts(spec: TrainingRunSpec, data: Mapping[str, str]) -> list[str] | None:
    if "prompts.txt" not in data:
        return None
    lines = [line.strip() for line in data["prompts.txt"].splitlines() if line.strip()]
    return lines[: spec.sampling.max_per_step]


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _environment(run: Run, job: str, procs: int) -> dict[str, str]:
    """The launcher's settings."""
    grace = run.spec.termination_grace_period_seconds
    env = {
        "OPENSORA_NNODES": str(run.nodes),
        "OPENSORA_NPROC_PER_NODE": str(procs),
        "OPENSORA_ATTEMPT": str(run.attempt),
        "OPENSORA_RUN_URI": run.spec.run_uri,
        "OPENSORA_MASTER_ADDR": f"{job}-0.{run.name}",
        "OPENSORA_MASTER_PORT": str(run.spec.rendezvous.port),
        "OPENSORA_RENDEZVOUS_SECONDS": str(run.spec.rendezvous.timeout_seconds),
        "OPENSORA_SAVE_DEADLINE_SECONDS": str(max(1, grace - 15, math.ceil(grace * 3 / 4))),
    }
    url = run.observed.platform.progress_url
    if url is not None:
        env["OPENSORA_PROGRESS_URL"] = f"{url}/v1/namespaces/{run.namespace}/runs/{run.name}/progress"
        env["OPENSORA_PROGRESS_TOKEN_FILE"] = f"{TOKEN_FOLDER}/token"
        if run.observed.platform.ca_bundle is not None:
            env["OPENSORA_PROGRESS_CA_FILE"] = f"{CONFIG_FOLDER}/{CA_KEY}"
    return env
