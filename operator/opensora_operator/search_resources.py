"""From a BatchSearch and what was found out for it to Kubernetes objects; and what its probes and its table say. Pure.

The table is the one that `opensora.search_batch_size` writes and `data.batch_table` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import yaml

from opensora_operator.api import BatchSearchSpec, BucketResult, TrainingProfileSpec
from opensora_operator.constants import MANAGER
from opensora_operator.plans import Object
from opensora_operator.resources import CONFIG_FOLDER, CONFIG_KEY, Workload, config_map, gang_job, parse_quantity
from opensora_operator.wire import from_wire, to_wire

TABLE_KEY = "table.json"
"""Key of the table in its ConfigMap."""
_SNAPSHOT_KEY = "snapshot.json"
_TABLE_VERSION = 1
_GRACE_SECONDS = 60


def job_name(name: str, probe: int) -> str:
    """The Job of a probe. No name is ever used twice."""
    return f"{name}-p{probe}"


def table_name(key: str) -> str:
    """The ConfigMap of a table."""
    return f"batch-table-{key[:16]}"


# ------------------------------------------------------------------------------------------------------------ snapshot


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What was found out when the search began, and holds from then on; kept in its ConfigMap."""

    profile: TrainingProfileSpec
    image: str
    procs_per_node: int
    queue: str | None
    storage_secret: str | None
    endpoint: str | None

    def to_data(self) -> dict[str, str]:
        return {_SNAPSHOT_KEY: json.dumps({**asdict(self), "profile": to_wire(self.profile)}, sort_keys=True)}

    @classmethod
    def from_data(cls, data: Mapping[str, str]) -> Self:
        values = json.loads(data[_SNAPSHOT_KEY])
        return cls(**{**values, "profile": from_wire(TrainingProfileSpec, values["profile"])})


def search_key(spec: BatchSearchSpec, snapshot: Snapshot, data: Mapping[str, str], buckets: Sequence[str]) -> str:
    """Names everything that the result follows from: model, image, accelerator, parallelism, and what is asked for."""
    profile = snapshot.profile
    accelerator = profile.accelerator
    facts = {
        "config": data.get(CONFIG_KEY),
        "file": spec.config.file,
        "overrides": list(spec.config.overrides),
        "image": snapshot.image,
        "accelerator": accelerator.name or f"{accelerator.count} {accelerator.resource}",
        "nodes": {**profile.pod_template.node_selector, **spec.pod_template.node_selector},
        "procs": snapshot.procs_per_node,
        "parallelism": to_wire(spec.parallelism),
        "buckets": sorted(buckets),
        "max_batch": spec.bounds.max_batch,
        "headroom_percent": spec.headroom_percent,
        "objective": spec.objective,
        "step_seconds": spec.step_seconds,
        "memory_budget": None if spec.memory_budget is None else parse_quantity(spec.memory_budget),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def buckets_of(spec: BatchSearchSpec, data: Mapping[str, str]) -> list[str] | str:
    """The buckets to search, as `240p/51`; or why they are not known."""
    if spec.buckets:
        return list(dict.fromkeys(f"{bucket.resolution}/{bucket.frames}" for bucket in spec.buckets))
    if spec.config.file is not None:
        return "spec.buckets is empty, and a config inside the image is read by the pods alone: name the buckets"
    if any(re.match(r"(data\.)?bucket_config\b|data=", override) for override in spec.config.overrides):
        return "spec.buckets is empty, and spec.config.overrides changes them: name the buckets"
    try:
        config = yaml.safe_load(data[CONFIG_KEY])
    except yaml.YAMLError as error:
        return f"spec.config is no YAML: {' '.join(str(error).split())}"
    table = config.get("bucket_config") if isinstance(config, dict) else None
    if table is None and isinstance(config, dict) and isinstance(config.get("data"), dict):
        table = config["data"].get("bucket_config")
    names = [name for resolution, level in _items(table) for name in _names(resolution, level)]
    return names or "spec.buckets is empty, and data.bucket_config of the config has no bucket that takes clips"


def _items(table: Any) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in table.items()] if isinstance(table, dict) else []


def _names(resolution: str, level: Any) -> list[str]:
    """Those that take clips: an entry without a batch size is a gate."""
    return [
        f"{resolution}/{frames}"
        for frames, entry in _items(level)
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    ]


# ------------------------------------------------------------------------------------------------------------- objects


def configuration_of(owner: Object, snapshot: Snapshot, data: Mapping[str, str]) -> Object:
    """The ConfigMap that all probes read."""
    return config_map(owner, {**data, **snapshot.to_data()}, component="probe")


def probe_of(
    owner: Object,
    spec: BatchSearchSpec,
    snapshot: Snapshot,
    *,
    configuration: str,
    result: BucketResult,
    step_seconds: float | None,
) -> Object:
    """The Job of a bucket's probe: one pod, and one try. What it finds out is in its termination message."""
    workload = Workload(
        owner=owner,
        component="probe",
        attempt=result.probe,
        image=snapshot.image,
        profile=snapshot.profile,
        template=spec.pod_template,
        command=("python", "-m", "opensora.search_batch_size"),
        args=_arguments(spec, snapshot, result, step_seconds),
        env={},
        config_map=configuration,
        grace_seconds=_GRACE_SECONDS,
        storage_secret=snapshot.storage_secret,
        endpoint=snapshot.endpoint,
        priority_class=spec.scheduling.priority_class_name or snapshot.profile.scheduling.priority_class_name,
    )
    name = job_name(owner["metadata"]["name"], result.probe)
    return gang_job(workload, name, nodes=1, queue=snapshot.queue, rank_zero_decides=False)


def _arguments(
    spec: BatchSearchSpec, snapshot: Snapshot, result: BucketResult, step_seconds: float | None
) -> tuple[str, ...]:
    """The command line. The run directory and the catalogue of the config are never touched, and may be missing."""
    flags: dict[str, object] = {
        "--bucket": result.bucket,
        "--output": "/tmp/batch-table.json",
        "--max-batch": spec.bounds.max_batch,
        "--headroom-percent": spec.headroom_percent,
        "--nproc-per-node": snapshot.procs_per_node,
        "--probe-timeout-seconds": spec.trial_timeout_seconds,
    }
    if spec.memory_budget is not None:
        flags["--memory-budget"] = math.floor(parse_quantity(spec.memory_budget))
    if step_seconds is not None:
        flags |= {"--objective": "EqualStepTime", "--step-seconds": f"{step_seconds:.6g}"}
    given = [text for flag, value in flags.items() for text in (flag, str(value))]
    known = ["--known", *result.evidence.split()] if result.evidence else []
    overrides = ["run_uri=/tmp/run", "data.path=/tmp/catalogue.csv", *spec.config.overrides]
    if spec.parallelism.sequence is not None:
        overrides.insert(2, f"parallel.sequence={spec.parallelism.sequence}")
    return (spec.config.file or f"{CONFIG_FOLDER}/{CONFIG_KEY}", *given, *known, *overrides)


# --------------------------------------------------------------------------------------------------------- what is said


@dataclass(frozen=True, kw_only=True)
class Report:
    """The termination message of a probe; `opensora.batch_search.report` writes it."""

    bucket: str
    known: str
    """Measurements, as in `BucketResult.evidence`."""
    trying: int | None
    """The batch size that was being measured; 0 is the empty batch."""
    batch_size: int | None
    peak_bytes: int | None
    seconds_per_step: float | None
    empty_bytes: int
    facts: dict[str, str | int | bool] | None
    reason: str
    code: int

    @classmethod
    def from_message(cls, message: Mapping[str, Any] | None) -> Self | None:
        """The report of a pod; None where it left none."""
        if message is None or not isinstance(message.get("bucket"), str) or not isinstance(message.get("known"), str):
            return None
        facts = message.get("facts")
        seconds = message.get("seconds_per_step")
        return cls(
            bucket=message["bucket"],
            known=message["known"],
            trying=_whole(message.get("trying")),
            batch_size=_whole(message.get("batch_size")),
            peak_bytes=_whole(message.get("peak_bytes")),
            seconds_per_step=float(seconds) if isinstance(seconds, int | float) else None,
            empty_bytes=_whole(message.get("empty_bytes")) or 0,
            facts=dict(facts) if isinstance(facts, dict) else None,
            reason=str(message.get("reason") or ""),
            code=_whole(message.get("code")) or 0,
        )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def common_step_seconds(results: Sequence[BucketResult]) -> float:
    """How long the steps of all buckets can be alike, given the largest batch of each: the step of the bucket that
    fills its memory soonest, or one clip of the slowest bucket where that takes longer."""
    shortest = min(float(result.seconds or 0) for result in results)
    single = [seconds for result in results for size, _, seconds in _points(result.evidence) if size == 1]
    return max([shortest, *single])


def _points(evidence: str) -> list[tuple[int, int, float]]:
    """(batch size, bytes, seconds) of what was measured."""
    parts = [item.split(":") for item in evidence.split()]
    return [(int(part[0]), int(part[1]), float(part[2])) for part in parts if len(part) == 3]


# --------------------------------------------------------------------------------------------------------------- table


def table_of(
    owner: Object,
    spec: BatchSearchSpec,
    key: str,
    *,
    facts: str,
    empty_bytes: int,
    step_seconds: float | None,
    results: Sequence[BucketResult],
) -> Object:
    """The ConfigMap of a table. It belongs to nobody: later searches and runs use it."""
    table = {
        "version": _TABLE_VERSION,
        "search": key,
        "facts": json.loads(facts) if facts else {},
        "headroom_percent": spec.headroom_percent,
        "objective": spec.objective,
        "step_seconds": step_seconds,
        "empty_bytes": empty_bytes,
        "buckets": {result.bucket: _entry(result) for result in results},
        "failed": {},
        "unfinished": {},
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": table_name(key),
            "namespace": owner["metadata"]["namespace"],
            "labels": {
                "app.kubernetes.io/name": "opensora",
                "app.kubernetes.io/component": "batch-table",
                "app.kubernetes.io/managed-by": MANAGER,
                "app.kubernetes.io/part-of": "opensora",
            },
        },
        "immutable": True,
        "data": {TABLE_KEY: json.dumps(table, indent=1)},
    }


def _entry(result: BucketResult) -> Object:
    points = sorted(_points(result.evidence))
    return {
        "batch_size": result.batch,
        "peak_bytes": result.peak_bytes,
        "seconds_per_step": float(result.seconds or 0),
        "fit": _fit([point for point in points if point[0] <= (result.batch or 0)]),
        "evidence": {
            "points": [
                {"batch_size": size, "peak_bytes": peak, "seconds_per_step": seconds} for size, peak, seconds in points
            ],
            "too_large": [int(item.partition(":")[0]) for item in result.evidence.split() if item.endswith(":oom")],
        },
    }


def _fit(points: Sequence[tuple[int, int, float]]) -> Object | None:
    """The line through the largest batch and one of at most half its size, as the core tells it."""
    if len(points) < 2:
        return None
    size, peak, _ = points[-1]
    other = next((point for point in reversed(points) if 2 * point[0] <= size), points[0])
    slope = (peak - other[1]) / (size - other[0])
    return {"constant_bytes": peak - slope * size, "bytes_per_clip": slope}


def read_table(data: Mapping[str, str], key: str, buckets: Sequence[str]) -> list[BucketResult] | None:
    """The results that a table holds; None where it is not the one for this search."""
    try:
        table = json.loads(data[TABLE_KEY])
        if table["version"] != _TABLE_VERSION or table["search"] != key:
            return None
        entries = table["buckets"]
        return [
            BucketResult(
                bucket=name,
                state="Found",
                batch=int(entries[name]["batch_size"]),
                peak_bytes=int(entries[name]["peak_bytes"]),
                seconds=f"{float(entries[name]['seconds_per_step']):.4g}",
                evidence=_evidence_text(entries[name]["evidence"]),
            )
            for name in buckets
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _evidence_text(evidence: Mapping[str, Any]) -> str:
    points = [
        f"{point['batch_size']}:{point['peak_bytes']}:{point['seconds_per_step']:.4g}" for point in evidence["points"]
    ]
    return " ".join([*points, *(f"{size}:oom" for size in evidence["too_large"])])
