"""What a sampling job samples from: a run, a weight file or a config; built, filled and ready on its device."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from opensora.acceleration.mesh import choose_device
from opensora.checkpoint import CheckpointInfo, find_checkpoints, read_checkpoint_tensors
from opensora.config.components import ModelConfig
from opensora.config.load import parse_train_config
from opensora.config.sample import SampleConfig
from opensora.config.train import StorageConfig, TrainConfig
from opensora.datasets.aspect import get_image_size, get_num_frames
from opensora.errors import CheckpointError, ConfigError, ObjectNotFoundError
from opensora.models.weights import load_weights
from opensora.records import CONFIG_PATH
from opensora.registry import MODELS, SCHEDULERS
from opensora.sampling.pipeline import SamplingPipeline
from opensora.storage import Storage, locate

logger = logging.getLogger(__name__)

DEFAULT_FPS = 24
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A pipeline, where its weights come from, and the sizes that it is asked for."""

    pipeline: SamplingPipeline
    weights: str
    """Names the weights so that others have another name."""
    num_frames: int
    image_size: tuple[int, int]
    """Height and width in pixels."""
    fps: int
    """What the model is told."""
    num_sampling_steps: int
    cfg_scale: float


def load_source(config: SampleConfig) -> Source:
    """Build everything that a sampling config names.

    Raises:
        ConfigError: the run directory is none, or there are no weights.
        CheckpointError: the run has no such checkpoint, or the weights do not fit.
    """
    device = choose_device(config.device)
    run = Storage(config.run, config=config.storage) if config.run is not None else None
    trained = _read_run_config(run) if run is not None else None

    vae_config = _chosen(config.vae, trained.vae if trained else None)
    text_config = config.text_encoder or (trained.text_encoder if trained else None)
    assert text_config is not None, "checked by the config"
    scheduler_config = _chosen(config.scheduler, trained.scheduler if trained else None)
    model_config = _chosen(config.model, trained.model if trained else None)
    vae: Any = MODELS.build(asdict(vae_config)).to(device).eval()
    text_encoder: Any = MODELS.build(asdict(text_config))
    scheduler: Any = SCHEDULERS.build(asdict(scheduler_config))
    model_config = replace(
        model_config,
        in_channels=model_config.in_channels or vae.out_channels,
        caption_channels=model_config.caption_channels or text_encoder.output_dim,
        model_max_length=model_config.model_max_length or text_encoder.model_max_length,
        enable_flash_attn=model_config.enable_flash_attn if config.flash_attn is None else config.flash_attn,
        enable_layernorm_kernel=(
            model_config.enable_layernorm_kernel if config.layernorm_kernel is None else config.layernorm_kernel
        ),
        enable_sequence_parallelism=False,
    )
    use_ema = config.use_ema and trained is not None and trained.optim.ema_decay is not None
    model, weights = _load_model(config, model_config, run, use_ema=use_ema)
    dtype = _DTYPES[config.dtype or (trained.dtype if trained is not None else "bf16")]
    model = model.to(device, dtype).eval().requires_grad_(False)

    samples = trained.samples if trained else None
    if config.image_size is None and config.resolution is not None and config.aspect_ratio is not None:
        image_size = get_image_size(config.resolution, config.aspect_ratio)
    else:
        image_size = _chosen(config.image_size, samples.image_size if samples else None)
    num_frames = config.num_frames or (samples.num_frames if samples else None)
    assert num_frames is not None, "checked by the config"
    return Source(
        pipeline=SamplingPipeline(model, vae, text_encoder, scheduler, device=device, dtype=dtype),
        weights=weights,
        num_frames=get_num_frames(num_frames),
        image_size=image_size,
        fps=_chosen(config.fps, samples.fps if samples else DEFAULT_FPS),
        num_sampling_steps=_chosen(
            config.num_sampling_steps,
            samples.num_sampling_steps if samples else None,
            scheduler.config.num_sampling_steps,
        ),
        cfg_scale=_chosen(config.cfg_scale, samples.cfg_scale if samples else None, scheduler.config.cfg_scale),
    )


def _chosen(*values: T | None) -> T:
    """The first value that is set: the job's own, the run's, the scheduler's."""
    value = next((value for value in values if value is not None), None)
    assert value is not None, "the config has checked that one of them is set"
    return value


def _read_run_config(run: Storage) -> TrainConfig:
    try:
        text = run.read(CONFIG_PATH).decode()
    except ObjectNotFoundError as error:
        raise ConfigError(
            f"{run.uri} is not a run directory: it has no {CONFIG_PATH}",
            hint="name the folder that was given to the training as run_uri",
        ) from error
    return parse_train_config(text, source=run.uri_of(CONFIG_PATH))


def _load_model(
    config: SampleConfig, model_config: ModelConfig, run: Storage | None, *, use_ema: bool
) -> tuple[nn.Module, str]:
    """The model with its weights, and the name of the weights."""
    if config.ckpt_path is not None:
        model: nn.Module = MODELS.build(asdict(replace(model_config, from_pretrained=None)))
        load_weights(model, config.ckpt_path)
        return model, _fingerprint(config.ckpt_path, config.storage)
    if run is not None:
        info = _find_checkpoint(run, config.step)
        model = MODELS.build(asdict(replace(model_config, from_pretrained=None)))
        _fill_from_checkpoint(model, run, info, use_ema=use_ema)
        logger.info("weights: step %d of %s%s", info.step, run.uri, ", averaged" if use_ema else "")
        return model, f"{run.uri_of(info.path)} {'ema' if use_ema else 'model'}"
    if model_config.from_pretrained is None:
        raise ConfigError(
            "no weights to sample from", hint="give --run DIR, --ckpt-path FILE, or model.from_pretrained in the config"
        )
    return MODELS.build(asdict(model_config)), _fingerprint(model_config.from_pretrained, config.storage)


def _find_checkpoint(run: Storage, step: int | str) -> CheckpointInfo:
    found = find_checkpoints(run)
    if not found:
        raise CheckpointError(
            f"{run.uri} has no complete checkpoint yet", hint="wait for the first one (checkpoint.every_steps)"
        )
    if step == "latest":
        return found[-1]
    matching = [info for info in found if info.step == step]
    if not matching:
        known = sorted({info.step for info in found})
        raise CheckpointError(
            f"{run.uri} has no complete checkpoint of step {step}", hint=f"there are: {', '.join(map(str, known))}"
        )
    return matching[-1]


def _fill_from_checkpoint(model: nn.Module, run: Storage, info: CheckpointInfo, *, use_ema: bool) -> None:
    """Averages go over the trained weights, which also hold what is not averaged: buffers and frozen parameters."""
    state = _read_prefix(run, info, "model.")
    if use_ema:
        state.update(_read_prefix(run, info, "ema."))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{run.uri_of(info.path)} does not fit the model: {error}",
            hint="leave the model's settings to the run",
        ) from error


def _read_prefix(run: Storage, info: CheckpointInfo, prefix: str) -> dict[str, Tensor]:
    tensors = read_checkpoint_tensors(run, info, prefix=prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _fingerprint(uri: str, config: StorageConfig) -> str:
    """The address of a weight file or folder, with what changes when its content does."""
    storage, name = locate(uri.rstrip("/"), config=config)
    infos = [storage.info(name)] if storage.exists(name) else storage.child(name).list()
    facts = ";".join(f"{info.path} {info.size} {info.etag or info.modified}" for info in infos)
    return f"{uri} {hashlib.sha256(facts.encode()).hexdigest()[:16]}"
