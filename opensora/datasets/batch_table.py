"""The table of a batch-size search: bucket → largest batch, with the measurements that prove it.

`opensora.search_batch_size` writes it, `data.batch_table` names it, and the operator keeps it in a ConfigMap. Importing
this module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from opensora.config.train import BucketTable, StorageConfig, TrainConfig
from opensora.datasets.bucket import Bucket
from opensora.errors import ConfigError, DataError, ObjectNotFoundError
from opensora.storage import locate

VERSION = 1
Facts = dict[str, str | int | bool]
"""What a measurement holds for: see `facts_of`."""


@dataclass(frozen=True)
class Point:
    """A training step that went well in a process of its own."""

    batch_size: int
    peak_bytes: int
    """Of the rank that took most."""
    seconds_per_step: float


@dataclass(frozen=True)
class Evidence:
    """What is known of one bucket."""

    points: tuple[Point, ...] = ()
    too_large: tuple[int, ...] = ()
    """Batch sizes that ended in running out of memory."""


@dataclass(frozen=True)
class Fit:
    """memory = constant + per clip · batch size."""

    constant_bytes: float
    bytes_per_clip: float


@dataclass(frozen=True, kw_only=True)
class BucketResult:
    """The batch size of a bucket. It was measured, as all of its points were."""

    batch_size: int
    peak_bytes: int
    seconds_per_step: float
    fit: Fit | None
    """None where a single batch size was measured."""
    evidence: Evidence


@dataclass(frozen=True, kw_only=True)
class BucketFailure:
    """A bucket without a batch size."""

    reason: str
    code: int
    """Exit code that says the same, see `opensora.errors.ExitCode`."""
    evidence: Evidence


@dataclass(frozen=True, kw_only=True)
class BatchTable:
    """The results of a search, complete or not."""

    facts: Facts
    headroom_percent: float
    objective: str
    step_seconds: float | None = None
    """With `EqualStepTime`: how long a step may take."""
    empty_bytes: int = 0
    """On a CPU: what a rank takes without a batch; the peaks come on top."""
    buckets: dict[str, BucketResult] = field(default_factory=dict)
    failed: dict[str, BucketFailure] = field(default_factory=dict)
    unfinished: dict[str, Evidence] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names what the measurements hold for; the same facts have the same key."""
        return key_of(self.facts)

    def evidence(self, bucket: str) -> Evidence:
        """What is known of a bucket, whatever became of it."""
        if bucket in self.unfinished:
            return self.unfinished[bucket]
        known = self.buckets.get(bucket) or self.failed.get(bucket)
        return known.evidence if known is not None else Evidence()

    def with_bucket(self, bucket: str, found: BucketResult | BucketFailure | Evidence) -> Self:
        """The table with this instead of what it had on the bucket."""
        buckets, failed, unfinished = dict(self.buckets), dict(self.failed), dict(self.unfinished)
        for part in (buckets, failed, unfinished):
            part.pop(bucket, None)
        if isinstance(found, BucketResult):
            buckets[bucket] = found
        elif isinstance(found, BucketFailure):
            failed[bucket] = found
        else:
            unfinished[bucket] = found
        return replace(self, buckets=buckets, failed=failed, unfinished=unfinished)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, "key": self.key, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is no table.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise ValueError(f"no object with version {VERSION}")
        try:
            return cls(
                facts=dict(values["facts"]),
                headroom_percent=values["headroom_percent"],
                objective=values["objective"],
                step_seconds=values["step_seconds"],
                empty_bytes=values["empty_bytes"],
                buckets={name: _result(found) for name, found in values["buckets"].items()},
                failed={name: _failure(found) for name, found in values["failed"].items()},
                unfinished={name: _evidence(found) for name, found in values["unfinished"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the fields of a table: {error!r}") from error


def _evidence(values: Mapping[str, Any]) -> Evidence:
    return Evidence(tuple(Point(**point) for point in values["points"]), tuple(values["too_large"]))


def _result(values: Mapping[str, Any]) -> BucketResult:
    fit = None if values["fit"] is None else Fit(**values["fit"])
    return BucketResult(**{**values, "fit": fit, "evidence": _evidence(values["evidence"])})


def _failure(values: Mapping[str, Any]) -> BucketFailure:
    return BucketFailure(**{**values, "evidence": _evidence(values["evidence"])})


def key_of(facts: Facts) -> str:
    """SHA-256 of the facts, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_batch_table(uri: str, *, storage: StorageConfig) -> BatchTable | None:
    """The table at a URI; None where there is nothing.

    Raises:
        DataError: there is something else.
    """
    folder, name = locate(uri, config=storage)
    try:
        return BatchTable.from_json(folder.read(name))
    except ObjectNotFoundError:
        return None
    except ValueError as error:
        raise DataError(
            f"{uri} is no table of batch sizes: {error}", hint="it is made by python -m opensora.search_batch_size"
        ) from error


def write_batch_table(uri: str, table: BatchTable, *, storage: StorageConfig) -> None:
    """Replace what is at a URI, in one step."""
    folder, name = locate(uri, config=storage)
    folder.write(name, table.to_json().encode())


# ------------------------------------------------------------------------------------------- what a table holds for


def facts_of(config: TrainConfig, *, ranks: int, accelerator: str) -> Facts:
    """What memory and time of a step depend on, apart from the versions and the size of the device."""
    model = {**asdict(config.model), "from_pretrained": None}
    return {
        "model": _digest(model),
        "vae": _digest(asdict(config.vae)),
        "text_encoder": _digest(asdict(config.text_encoder)),
        "scheduler": _digest(asdict(config.scheduler)),
        "dtype": config.dtype,
        "ema": config.optim.ema_decay is not None,
        "masks": bool(config.train.mask_ratios),
        "sharding": config.parallel.sharding,
        "activation_checkpointing": config.parallel.activation_checkpointing,
        "shards": ranks // config.parallel.replicas,
        "micro_batches": micro_batches_per_rank(config, ranks=ranks),
        "accelerator": accelerator,
    }


def micro_batches_per_rank(config: TrainConfig, *, ranks: int) -> int:
    """1, or 2 for "more than one": then gradients are kept while the next micro-batch is computed."""
    per_step = config.train.micro_batches_per_step
    return 2 if (config.train.accumulation > 1 if per_step is None else per_step > ranks) else 1


def _digest(settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{settings['type']} {digest[:12]}"


_MUST_AGREE = (
    "model", "vae", "text_encoder", "scheduler", "dtype", "ema", "masks", "sharding", "activation_checkpointing",
    "accelerator",
)  # fmt: skip


def check_facts(table: BatchTable, facts: Facts, *, uri: str) -> list[str]:
    """Whether a table's measurements hold for a run.

    Returns:
        What differs and may matter, for a warning.

    Raises:
        ConfigError: they do not.
    """
    other = [
        f"{name} {facts[name]} (measured: {table.facts.get(name)})"
        for name in _MUST_AGREE
        if table.facts.get(name) != facts[name]
    ]
    if int(facts["micro_batches"]) > int(table.facts.get("micro_batches", 1)):
        other.append("several micro-batches per rank and step (measured: one)")
    if other:
        raise ConfigError(
            f"data.batch_table={uri!r} was measured for something else than {', '.join(other)}",
            hint="search again with this config on this hardware, or remove data.batch_table and write the sizes in "
            "data.bucket_config",
        )
    measured = int(table.facts.get("shards", 1))
    if int(facts["shards"]) < measured:
        return [f"the weights lie on {facts['shards']} ranks instead of {measured}: each one has less room for clips"]
    return []


# ------------------------------------------------------------------------------------------------------- buckets


def bucket_names(bucket_config: BucketTable) -> list[str]:
    """The buckets that take clips, as `240p/51`: largest resolution first, then longest."""
    return list(dict.fromkeys(f"{shape.resolution}/{shape.num_frames}" for shape in Bucket(bucket_config).entries))


def with_batch_sizes(bucket_config: BucketTable, table: BatchTable, *, uri: str) -> BucketTable:
    """The bucket table with the batch sizes of a search; buckets that take no clips stay as they are.

    Raises:
        ConfigError: a bucket has no batch size there.
    """
    missing = [name for name in bucket_names(bucket_config) if name not in table.buckets]
    if missing:
        told = ", ".join(f"{name} ({table.failed[name].reason})" if name in table.failed else name for name in missing)
        raise ConfigError(
            f"data.batch_table={uri!r} has no batch size for {told}",
            hint=f"search for it: python -m opensora.search_batch_size CONFIG --bucket {' '.join(missing)} "
            f"--output {uri}; or remove the bucket from data.bucket_config",
        )
    return {
        resolution: {
            frames: (
                probability,
                None if batch_size is None else table.buckets[f"{resolution}/{frames}"].batch_size,
            )
            for frames, (probability, batch_size) in level.items()
        }
        for resolution, level in bucket_config.items()
    }
