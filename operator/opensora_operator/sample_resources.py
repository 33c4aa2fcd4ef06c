"""From a SampleJob and what was found out for it to Kubernetes objects. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import yaml

from opensora_operator.api import SampledCheckpoint, SampleJobSpec, TrainingProfileSpec
from opensora_operator.constants import TRAINER, ExitCode
from opensora_operator.plans import Object
from opensora_operator.resources import CONFIG_FOLDER, CONFIG_KEY, Workload, config_map, indexed_job
from opensora_operator.wire import from_wire, to_wire

PROMPTS_KEY = "prompts.txt"
_SNAPSHOT_KEY = "snapshot.json"
_FINAL_CODES = (ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG)
"""A shard that ends so would end so again."""


def job_name(name: str) -> str:
    """The Job of a SampleJob."""
    return f"{name}-sample"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What was found out when the Job was made, and holds from then on; kept in its ConfigMap."""

    profile: TrainingProfileSpec
    image: str
    procs_per_node: int
    num_shards: int
    queue: str | None
    storage_secret: str | None
    endpoint: str | None

    def to_data(self) -> dict[str, str]:
        return {_SNAPSHOT_KEY: json.dumps({**asdict(self), "profile": to_wire(self.profile)}, sort_keys=True)}

    @classmethod
    def from_data(cls, data: Mapping[str, str]) -> Self:
        values = json.loads(data[_SNAPSHOT_KEY])
        return cls(**{**values, "profile": from_wire(TrainingProfileSpec, values["profile"])})


def prompt_lines(text: str) -> list[str]:
    """The prompts of a text, as the core counts them: lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def checkpoint_of_uri(uri: str, *, has_config: bool) -> SampledCheckpoint:
    """Which weights a URI means: a run directory, a checkpoint in one, or, beside a config, weights."""
    found = re.fullmatch(r"(.+)/checkpoints/step-([0-9]+)(/attempt-[0-9]+)?/?", uri)
    if found is not None and not has_config:
        return SampledCheckpoint(uri=found[1], step=int(found[2]))
    return SampledCheckpoint(uri=uri)


def sheet_uri(spec: SampleJobSpec, data: Mapping[str, str]) -> str | None:
    """Where the core puts the contact sheet; None where the settings want none."""
    settings = _settings(spec, data)
    if settings.get("sheet") is False:
        return None
    name = settings.get("sample_name")
    return f"{spec.output_uri.rstrip('/')}/{f'{name}_' if name else ''}sheet.png"


def clips_of_shard(index: int, spec: SampleJobSpec, snapshot: Snapshot, data: Mapping[str, str]) -> int | None:
    """How many clips a shard makes: the core deals whole batches out, one after the other.

    None where the size of a batch stands in a file of the image.
    """
    if spec.config.file is not None:
        return None
    size = _settings(spec, data).get("batch_size") or 1
    clips = len(prompt_lines(data[PROMPTS_KEY])) * spec.num_samples
    if not isinstance(size, int) or size < 1:
        return None
    ranks = snapshot.procs_per_node
    parts = range(index * ranks, (index + 1) * ranks)
    mine = {number for number in range(-(-clips // size)) if number % (snapshot.num_shards * ranks) in parts}
    return sum(min(size, clips - number * size) for number in mine)


def _settings(spec: SampleJobSpec, data: Mapping[str, str]) -> dict[str, Any]:
    """The config's settings at the top level, as far as they are known outside of the image."""
    settings = _read_yaml(data.get(CONFIG_KEY, ""))
    settings = dict(settings) if isinstance(settings, dict) else {}
    for override in spec.config.overrides:
        key, _, value = override.partition("=")
        settings[key] = _read_yaml(value)
    return settings


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # the core says what is wrong with it
        return None


def objects_of(
    owner: Object, spec: SampleJobSpec, checkpoint: SampledCheckpoint, snapshot: Snapshot, data: Mapping[str, str]
) -> list[Object]:
    """The ConfigMap and the Job, in the order in which they are made."""
    configuration = config_map(owner, {**data, **snapshot.to_data()}, component="sampler")
    workload = Workload(
        owner=owner,
        component="sampler",
        attempt=1,
        image=snapshot.image,
        profile=snapshot.profile,
        template=spec.pod_template,
        command=("python", "-m", "opensora.launch"),
        args=arguments_of(spec, checkpoint, data),
        env={
            "OPENSORA_NPROC_PER_NODE": str(snapshot.procs_per_node),
            "OPENSORA_NUM_SHARDS": str(snapshot.num_shards),
            "OPENSORA_SAVE_DEADLINE_SECONDS": str(max(1, spec.termination_grace_period_seconds - 10)),
        },
        config_map=configuration["metadata"]["name"],
        grace_seconds=spec.termination_grace_period_seconds,
        storage_secret=snapshot.storage_secret,
        endpoint=snapshot.endpoint,
        priority_class=spec.scheduling.priority_class_name or snapshot.profile.scheduling.priority_class_name,
    )
    return [configuration, _job(workload, spec, snapshot)]


def _job(workload: Workload, spec: SampleJobSpec, snapshot: Snapshot) -> Object:
    """Pods that know nothing of each other: a shard that fails is tried again by itself, and the others go on."""
    shards = snapshot.num_shards
    name = job_name(workload.owner["metadata"]["name"])
    job = indexed_job(workload, name, completions=shards, parallelism=min(spec.workers, shards), queue=snapshot.queue)
    job["spec"] |= {
        "backoffLimitPerIndex": spec.retries_per_shard,
        "maxFailedIndexes": shards,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                _on_codes("FailIndex", _FINAL_CODES),
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                # Asked to stop: what it made is kept, and the next pod goes on from there.
                _on_codes("Ignore", (ExitCode.STOPPED,)),
            ]
        },
    }
    return job


def _on_codes(action: str, codes: tuple[ExitCode, ...]) -> Object:
    values = sorted(int(code) for code in codes)
    return {"action": action, "onExitCodes": {"containerName": TRAINER, "operator": "In", "values": values}}


def arguments_of(spec: SampleJobSpec, checkpoint: SampledCheckpoint, data: Mapping[str, str]) -> tuple[str, ...]:
    """The command line of the core: a config where there is one, and what the spec says as overrides."""
    path = spec.config.file or (f"{CONFIG_FOLDER}/{CONFIG_KEY}" if CONFIG_KEY in data else None)
    is_weights = path is not None and spec.checkpoint.uri is not None
    overrides = {
        "run": None if is_weights else checkpoint.uri,
        "ckpt_path": checkpoint.uri if is_weights else None,
        "step": checkpoint.step,
        "prompt_path": f"{CONFIG_FOLDER}/{PROMPTS_KEY}",
        "save_dir": spec.output_uri,
        "seed": spec.seed,
        "num_sample": spec.num_samples,
        "num_frames": spec.num_frames,
        "image_size": None if spec.image_size is None else list(spec.image_size),
        "resolution": spec.resolution,
        "aspect_ratio": spec.aspect_ratio,
        "fps": spec.fps,
        "num_sampling_steps": spec.sampling_steps,
        "cfg_scale": spec.guidance,
    }
    given = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"  # quoted: a value is YAML, and a path may look like something
        for key, value in overrides.items()
        if value is not None
    ]
    return ("opensora.sample", *([path] if path is not None else []), *given, *spec.config.overrides)
