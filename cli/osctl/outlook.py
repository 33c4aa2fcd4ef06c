"""What a run will ask of its ranks, told from its file: layout, memory for each bucket, length of an epoch.

Memory is an estimate by formula (`opensora.datasets.memory`), unless the config names the table of a batch search that
has measured it. Time is told by such a table alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from opensora_operator.status import duration

from opensora.config.train import StorageConfig, TrainConfig
from opensora.datasets.batch_table import BatchTable, read_batch_table, with_batch_sizes
from opensora.datasets.bucket import Bucket, Probability
from opensora.datasets.catalogue import load_catalogue
from opensora.datasets.cost import clip_flops, clip_tokens, shape_costs
from opensora.datasets.memory import (
    ParameterCounts,
    StateBytes,
    activation_bytes_per_clip,
    count_parameters,
    largest_shape,
    state_bytes,
)
from opensora.datasets.plan import build_plan
from opensora.errors import OpenSoraError
from opensora.storage import locate
from osctl.output import as_table, printable

_PATIENCE_SECONDS = 5.0
"""How long an object store that does not answer is tried: nothing depends on it."""
_MAX_CATALOGUE_BYTES = 256 * 2**20
"""A larger catalogue takes longer to read than people wait for this."""
_IN_A_BUCKET = "the {} is in a bucket, which --read-buckets reads"
_ALWAYS_UNKNOWN = (
    "temporaries of kernels and collectives, the VAE, CUDA's own memory and what the allocator wastes: a batch search "
    "measures them"
)


@dataclass(frozen=True, kw_only=True)
class BucketOutlook:
    """A bucket, at the aspect ratio that needs most."""

    name: str
    probability: Probability
    batch_size: int
    size: tuple[int, int]
    """Height and width in pixels."""
    tokens: int
    """Of a clip."""
    tera_flops: float
    """Of a clip's forward and backward pass."""
    activation_bytes: int
    """Of a micro-batch, by formula."""
    rank_bytes: int
    """All that a rank holds: by formula, or as measured."""
    seconds: float | None
    """Of a step with one micro-batch, measured; None where there is no table."""


@dataclass(frozen=True, kw_only=True)
class EpochOutlook:
    """The first epoch, from the catalogue."""

    clips: int
    steps: int
    unassigned: int
    """Rows that no bucket takes."""
    left_over: int
    """Rows that fill no batch."""
    seconds_per_step: float | None
    """By the table of a batch search."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What can be told of a training run before it starts."""

    ranks: int
    replicas: int
    sharding: str
    micro_batches_per_step: int
    total_steps: int | None
    parameters: ParameterCounts
    state: StateBytes
    buckets: tuple[BucketOutlook, ...]
    epoch: EpochOutlook | None
    unknown: tuple[str, ...]
    """What is not forecast, and why."""


def look_ahead(config: TrainConfig, *, ranks: int, reads_buckets: bool = False) -> Outlook:
    """The outlook of a config on so many ranks.

    Args:
        config: of the run.
        ranks: of the run.
        reads_buckets: whether catalogue and table are read from object stores, too.

    Raises:
        ConfigError: the table of batch sizes lacks a bucket.
    """
    unknown: list[str] = []
    # A store that does not answer must not hold up what needs none.
    storage = replace(config.storage, retry_deadline_seconds=_PATIENCE_SECONDS)
    table = _table(config, storage, unknown, reads_buckets=reads_buckets)
    if table is not None:
        sizes = with_batch_sizes(config.data.bucket_config, table, uri=str(config.data.batch_table))
        config = replace(config, data=replace(config.data, bucket_config=sizes))
    elif config.data.batch_table is None:
        unknown.append("seconds per step: no table of a batch search is named (data.batch_table)")
    per_step = config.train.micro_batches_per_step or ranks * config.train.accumulation
    epoch = None
    if reads_buckets or "://" not in config.data.path:
        epoch = _epoch(config, storage, table, ranks=ranks, per_step=per_step, unknown=unknown)
    else:
        unknown.append(f"steps of an epoch: {_IN_A_BUCKET.format('catalogue')}")
    return Outlook(
        ranks=ranks,
        replicas=config.parallel.replicas,
        sharding=config.parallel.sharding,
        micro_batches_per_step=per_step,
        total_steps=config.train.steps,
        parameters=count_parameters(config),
        state=state_bytes(config, ranks=ranks),
        buckets=tuple(_buckets(config, table, ranks=ranks)),
        epoch=epoch,
        unknown=(*unknown, _ALWAYS_UNKNOWN),
    )


def as_data(outlook: Outlook) -> dict[str, Any]:
    """What `-o json` prints."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {_camel(key): named(item) for key, item in value.items()}
        return [named(item) for item in value] if isinstance(value, list | tuple) else value

    data: dict[str, Any] = named(dataclasses.asdict(outlook))
    data["state"]["total"] = outlook.state.total
    return data


def as_text(outlook: Outlook) -> str:
    """For people."""
    state, counts, epoch = outlook.state, outlook.parameters, outlook.epoch
    groups = "" if outlook.replicas == 1 else f"{outlook.replicas} groups of "
    trained = "" if counts.trainable == counts.total else f", {_count(counts.trainable)} of them trained"
    parts = (
        ("weights", state.weights), ("gathered", state.gathered), ("gradients", state.gradients),
        ("optimiser", state.optimizer), ("averages", state.averages),
    )  # fmt: skip
    held = ", ".join(f"{name} {_bytes(size)}" for name, size in parts if size)
    facts = [
        ("layout", f"{groups}{outlook.ranks // outlook.replicas} shards, {outlook.sharding}"),
        ("step", f"{outlook.micro_batches_per_step} micro-batches over all ranks"),
        ("model", f"{_count(counts.total)} parameters{trained}"),
        ("state", f"{_bytes(state.total)} a rank: {held}"),
    ]
    if epoch is not None:
        lost = f", {epoch.unassigned} fit no bucket" if epoch.unassigned else ""
        lost += f", {epoch.left_over} fill no batch" if epoch.left_over else ""
        total = f"; {outlook.total_steps / epoch.steps:.3g} epochs in all" if outlook.total_steps else ""
        facts.append(("epoch", f"{epoch.steps} steps, {epoch.clips} clips{lost}{total}"))
        if epoch.seconds_per_step is not None:
            steps = outlook.total_steps or epoch.steps
            whole = duration(steps * epoch.seconds_per_step)
            facts.append(("time", f"{epoch.seconds_per_step:.3g} s/step by the table, {whole} for {steps} steps"))
    rows = [
        (
            f"  {bucket.name}",
            _share(bucket.probability),
            str(bucket.batch_size),
            f"{bucket.size[0]}x{bucket.size[1]}",
            str(bucket.tokens),
            f"{bucket.tera_flops:.3g}",
            _bytes(bucket.activation_bytes),
            _bytes(bucket.rank_bytes),
            "" if bucket.seconds is None else f"{bucket.seconds:.3g}",
        )
        for bucket in outlook.buckets
    ]
    header = ("  BUCKET", "SHARE", "BATCH", "LARGEST", "TOKENS", "TFLOP", "ACTIVATIONS", "RANK HOLDS", "S/STEP")
    lines = [f"  {name:<8} {text}" for name, text in facts]
    unknown = [f"  not forecast: {printable(words)}" for words in outlook.unknown]
    return "\n".join([*lines, as_table(header, rows), *unknown])


# ------------------------------------------------------------------------------------------------------------- parts


def _table(
    config: TrainConfig, storage: StorageConfig, unknown: list[str], *, reads_buckets: bool
) -> BatchTable | None:
    uri = config.data.batch_table
    if uri is None:
        return None
    if "://" in uri and not reads_buckets:
        unknown.append(f"what was measured: {_IN_A_BUCKET.format('table')}")
        return None
    try:
        table = read_batch_table(uri, storage=storage)
    except OpenSoraError as error:
        unknown.append(f"what {uri} has measured: {error.message}")
        return None
    if table is None:
        unknown.append(f"what {uri} has measured: it is not there")
    return table


def _buckets(config: TrainConfig, table: BatchTable | None, *, ranks: int) -> list[BucketOutlook]:
    entries = Bucket(config.data.bucket_config).entries
    state = state_bytes(config, ranks=ranks).total
    found = []
    for name in dict.fromkeys((entry.resolution, entry.num_frames) for entry in entries):
        shape = largest_shape(config, [entry for entry in entries if (entry.resolution, entry.num_frames) == name])
        size = {"num_frames": shape.num_frames, "height": shape.height, "width": shape.width}
        time, space = clip_tokens(**size, model=config.model)
        flops = clip_flops(**size, model=config.model, text_tokens=config.text_encoder.model_max_length)
        activations = shape.batch_size * activation_bytes_per_clip(config, shape)
        key = f"{shape.resolution}/{shape.num_frames}"
        measured = None if table is None else table.buckets.get(key)
        found.append(
            BucketOutlook(
                name=key,
                probability=config.data.bucket_config[shape.resolution][shape.num_frames][0],
                batch_size=shape.batch_size,
                size=(shape.height, shape.width),
                tokens=time * space,
                tera_flops=flops / 1e12,
                activation_bytes=activations,
                rank_bytes=state + activations if measured is None else measured.peak_bytes,
                seconds=None if measured is None else measured.seconds_per_step,
            )
        )
    return found


def _epoch(
    config: TrainConfig,
    storage: StorageConfig,
    table: BatchTable | None,
    *,
    ranks: int,
    per_step: int,
    unknown: list[str],
) -> EpochOutlook | None:
    data, bucket = config.data, Bucket(config.data.bucket_config)
    try:
        folder, name = locate(data.path, config=storage)
        size = folder.info(name).size
        if size > _MAX_CATALOGUE_BYTES:
            unknown.append(f"steps of an epoch: the catalogue has {_bytes(size)}, which takes long to read")
            return None
        catalogue = load_catalogue(data.path, root=data.root, repeats=data.repeats, config=storage)
        plan = build_plan(
            catalogue,
            bucket,
            seed=config.seed,
            epoch=0,
            micro_batches_per_step=per_step,
            costs=shape_costs(bucket.entries, config.model, text_tokens=config.text_encoder.model_max_length),
            balance_window=config.train.balance_window,
            drop_last=data.drop_last,
            shuffle=data.shuffle,
            frame_interval=data.frame_interval,
        )
    except OpenSoraError as error:
        unknown.append(f"steps of an epoch: {error.message}")
        return None
    return EpochOutlook(
        clips=plan.num_clips,
        steps=plan.num_steps,
        unassigned=plan.num_unassigned,
        left_over=plan.num_left_over,
        seconds_per_step=None if table is None else _mean_seconds(plan.counts(), table) * per_step / ranks,
    )


def _mean_seconds(counts: dict[str, tuple[int, int]], table: BatchTable) -> float:
    """Of a micro-batch, over an epoch. Counts are by bucket and ratio, the table by bucket."""
    batches = {name: num for name, (_, num) in counts.items()}
    seconds = sum(table.buckets[name.rpartition("/")[0]].seconds_per_step * num for name, num in batches.items())
    return seconds / sum(batches.values())


def _share(probability: Probability) -> str:
    parts: Sequence[float] = probability if isinstance(probability, tuple) else (probability,)
    return " x ".join(f"{part:g}" for part in parts)


def _count(number: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number}"


def _bytes(size: float) -> str:
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 2**10:.3g} KiB"


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
