"""Open-Sora's flat keys and flags, and where they live in our settings.

Every key of a config of Open-Sora 1.0 to 1.2 is moved to its place, has no effect for a stated reason (which is
logged), or is refused with a reason. None is dropped in silence.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from opensora.config.documents import Document, KeyPath, describe
from opensora.config.train import TrainConfig
from opensora.config.typed import Problem

logger = logging.getLogger(__name__)


class _RefusedError(Exception):
    """A value that has no equivalent here; the text is the reason."""


@dataclass(frozen=True)
class KeyRule:
    """What becomes of one key of Open-Sora."""

    key: str
    """Its name there; dots for keys inside a dict."""
    verdict: Literal["moved", "no effect", "refused"]
    text: str
    """For the reference page: the note on a move, the reason otherwise."""
    target: str | None = None
    """Our key, where it is moved."""
    convert: Callable[[Any], Any] | None = None
    """The value here, given the value there."""


def _moved(key: str, target: str, text: str = "", convert: Callable[[Any], Any] | None = None) -> KeyRule:
    return KeyRule(key, "moved", text, target, convert)


def _no_effect(key: str, reason: str) -> KeyRule:
    return KeyRule(key, "no effect", reason)


def _refused(key: str, reason: str) -> KeyRule:
    """Refused when set; `None` and `False` mean the same here and there."""
    return KeyRule(key, "refused", reason)


def _dataset_type(value: Any) -> None:
    if value != "VariableVideoTextDataset":
        raise _RefusedError("only VariableVideoTextDataset is available; give the sizes in bucket_config")


def _transform(value: Any) -> Any:
    if value is None:
        raise _RefusedError("clips have to be brought to the size of their bucket; use resize_crop or center")
    return value


def _mask_ratios(value: Any) -> Any:
    """Open-Sora 1.1 wrote `mask_` before every name, and `mask_no` for no mask."""
    if not isinstance(value, Mapping):
        return value
    names = {"mask_no": "identity"}
    return {
        names.get(name, name.removeprefix("mask_")) if isinstance(name, str) else name: ratio
        for name, ratio in value.items()
    }


def _sharding(value: Any) -> Any:
    if value not in ("zero1", "zero2", "zero1-seq", "zero2-seq"):
        raise _RefusedError("known plugins: zero1, zero2, zero1-seq, zero2-seq")
    return "zero2"


def _dtype(value: Any) -> Any:
    names = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
    return names.get(value, value) if isinstance(value, str) else value


TRAIN_RULES: tuple[KeyRule, ...] = (
    _moved("dataset.data_path", "data.path"),
    _moved("data_path", "data.path"),
    KeyRule("dataset.type", "moved", "checked: VariableVideoTextDataset is what `data` describes", None, _dataset_type),
    _moved("dataset.transform_name", "data.transform", convert=_transform),
    _moved("dataset.frame_interval", "data.frame_interval"),
    _refused("dataset.num_frames", "the frames of a clip are those of its bucket"),
    _refused("dataset.image_size", "the size of a clip is that of its bucket"),
    _refused("dataset.dummy_text_feature", "captions are encoded while training; there are no dummy features"),
    _moved("bucket_config", "data.bucket_config"),
    _refused("batch_size", "batch sizes stand in bucket_config; for example data.bucket_config.144p.51=[1.0, 2]"),
    _moved("num_workers", "data.num_threads", "0 becomes 1", lambda value: 1 if value == 0 else value),
    _no_effect("num_bucket_build_workers", "clips are assigned to buckets in one vectorised pass"),
    _no_effect("prefetch_factor", "data.prefetch_batches says how many micro-batches are read ahead"),
    _moved("dtype", "dtype", "float16, half, bfloat16, float32 and float64 are accepted as well", _dtype),
    _moved("plugin", "parallel.sharding", "zero1, zero2 and their -seq forms are all `zero2`", _sharding),
    _moved("sp_size", "parallel.sequence"),
    _no_effect("reduce_bucket_size_in_m", "gradients are reduced block by block"),
    _moved(
        "grad_checkpoint",
        "parallel.activation_checkpointing",
        "True is `full`, False `none`",
        lambda value: {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value,
    ),
    _moved("mask_ratios", "train.mask_ratios", "with or without the prefix `mask_`", _mask_ratios),
    _moved("epochs", "train.epochs", "1000 where an Open-Sora config names neither epochs nor train.steps"),
    _moved("log_every", "train.log_every", "1 where an Open-Sora config does not name it"),
    _moved("ckpt_every", "checkpoint.every_steps", "0 (only at the end) where an Open-Sora config does not name it"),
    _moved("load", "checkpoint.load", "starts a new run at step 0; to continue a run, start it with the same run_uri"),
    _no_effect("start_from_scratch", "checkpoint.load always starts at step 0"),
    _moved("lr", "optim.lr"),
    _moved("adam_eps", "optim.eps"),
    _moved("weight_decay", "optim.weight_decay"),
    _moved("warmup_steps", "optim.warmup_steps", "None becomes 0", lambda value: 0 if value is None else value),
    _moved("grad_clip", "optim.grad_clip", "None becomes 0", lambda value: 0 if value is None else value),
    _moved("ema_decay", "optim.ema_decay"),
    _moved("outputs", "run_uri", "`<outputs>/<name of the config>-<model type>`, without a running number: see above"),
    _moved("wandb", "report.wandb"),
    _no_effect("record_time", "step times are always in the metrics"),
    _refused("load_video_features", "training on latents from disk is not available; clips are encoded while training"),
    _refused("load_text_features", "training on text features from disk is not available"),
    _no_effect("vae_out_channels", "the VAE says how many channels it has"),
    _no_effect("text_encoder_output_dim", "the text encoder says how wide its output is"),
    _no_effect("text_encoder_model_max_length", "text_encoder.model_max_length says so"),
    _moved("ckpt_path", "model.from_pretrained"),
    _moved("flash_attn", "model.enable_flash_attn"),
    _moved("layernorm_kernel", "model.enable_layernorm_kernel"),
    _moved("model.enable_flashattn", "model.enable_flash_attn", "the name in Open-Sora 1.1"),
    _no_effect("model.force_huggingface", "from_pretrained finds out what it is given"),
    _refused("resolution", "only the batch-size search reads it; the resolutions of training stand in bucket_config"),
)
"""Keys of training configs and flags of `scripts/train.py`."""

SAMPLE_RULES: tuple[KeyRule, ...] = (
    _moved("dtype", "dtype", "float16, half, bfloat16, float32 and float64 are accepted as well", _dtype),
    _moved("model.enable_flashattn", "model.enable_flash_attn", "the name in Open-Sora 1.1"),
    _no_effect("model.force_huggingface", "from_pretrained finds out what it is given"),
    _refused("llm_refine", "prompts are sampled as they are; refinement by a language model is not available"),
    _refused("prompt_generator", "prompts come from prompt or prompt_path"),
    _refused("watermark", "clips are saved without a watermark"),
    _refused("outputs", "results go to save_dir"),
    _refused("data_path", "prompts come from prompt or prompt_path; a catalogue can be given as prompt_path"),
)
"""Keys of inference configs and flags of `scripts/inference.py` that are not ours under the same name."""

_DEFAULTS = {"train.epochs": 1000, "train.log_every": 1, "checkpoint.every_steps": 0}
"""What Open-Sora assumes where a config is silent, and we do not."""


def map_file_keys(rules: Sequence[KeyRule], document: Document, problems: list[Problem]) -> None:
    """Move Open-Sora's keys in a document to where they belong; report clashes with keys that are there already."""
    table = {rule.key: rule for rule in rules}
    found = False
    for rule in rules:
        path = tuple(rule.key.split("."))
        container = document.values if len(path) == 1 else document.values.get(path[0])
        if not isinstance(container, dict) or path[-1] not in container:
            continue
        origin = document.where(path)
        value = container.pop(path[-1])
        document.forget_origins(path)
        found = found or rule.key in ("bucket_config", "dataset.type")
        _apply(rule, value, document, origin, problems, replace=False)
    if isinstance(dataset := document.values.get("dataset"), dict) and "dataset.type" in table:
        for name, value in document.values.pop("dataset").items():
            known = [key.partition(".")[2] for key in table if key.startswith("dataset.")]
            close = difflib.get_close_matches(str(name), known, n=1)
            problems.append(
                Problem(
                    f"dataset.{name}={describe(value)} ({document.where(('dataset', str(name)))}): unknown key",
                    f"did you mean dataset.{close[0]}?" if close else f"known here: {', '.join(known)}",
                )
            )
        found = found or dataset is not None
    if found:
        _fill_defaults(document)


def map_flags(
    rules: Sequence[KeyRule], document: Document, flags: Mapping[str, Any], problems: list[Problem]
) -> list[KeyPath]:
    """Write flags over the values of a document; returns the keys that they set."""
    table = {rule.key: rule for rule in rules}
    written: list[KeyPath] = []
    for name, value in flags.items():
        if value is None:
            continue
        rule = table.get(name, _moved(name, name))
        target = _apply(rule, value, document, f"command line, --{name.replace('_', '-')}", problems, replace=True)
        if target is not None:
            written.append(target)
    return written


def _apply(
    rule: KeyRule, value: Any, document: Document, origin: str, problems: list[Problem], *, replace: bool
) -> KeyPath | None:
    """Carry out one rule; the key that was written, if any."""
    shown = f"{rule.key}={describe(value)} ({origin})"
    if rule.verdict == "no effect":
        logger.info("%s has no effect: %s", shown, rule.text)
        return None
    if rule.verdict == "refused":
        if not _means_nothing(value):
            problems.append(Problem(f"{shown}: cannot be honoured: {rule.text}", f"remove {rule.key}"))
        return None
    try:
        converted = rule.convert(value) if rule.convert else value
    except _RefusedError as reason:
        problems.append(Problem(f"{shown}: cannot be honoured: {reason}"))
        return None
    if rule.target is None:
        return None
    if rule.key == "outputs":
        converted = _run_uri(value, document)
    if rule.key == "load" and value is not None:
        logger.warning("%s starts a new run at step 0; the same run_uri continues a run", shown)
    path = tuple(rule.target.split("."))
    container = document.values
    for part in path[:-1]:
        if container.get(part) is None:
            container[part] = {}
        if not isinstance(container[part], dict):
            return None  # of the wrong type as a whole, which is reported when it is read
        container = container[part]
    if path[-1] in container and not replace and container[path[-1]] != converted:
        problems.append(
            Problem(
                f"{shown}: {rule.target} is given as well ({document.where(path)}): {describe(container[path[-1]])}",
                "remove one of them",
            )
        )
        return None
    container[path[-1]] = converted
    document.forget_origins(path)
    document.origins[path] = origin if replace or rule.key == rule.target else f"{origin}, {rule.key}"
    return path


def _means_nothing(value: Any) -> bool:
    """Not set: `None`, `False`, or a size of nothing but `None`."""
    return value is None or value is False or (isinstance(value, list | tuple) and all(item is None for item in value))


def _run_uri(outputs: Any, document: Document) -> Any:
    """The run directory below `outputs`. It carries the config's name and no running number, so that the same command
    continues the same run, and every rank finds the same directory."""
    if not isinstance(outputs, str):
        return outputs
    model = document.values.get("model")
    name = str(model.get("type", "STDiT3")) if isinstance(model, dict) else "STDiT3"
    stem = PurePath(document.name).stem if PurePath(document.name).suffix else "run"
    return f"{outputs.rstrip('/') or '/'}/{stem}-{name.replace('/', '-')}"


def _fill_defaults(document: Document) -> None:
    for key, value in _DEFAULTS.items():
        section, name = key.split(".")
        settings = document.values.setdefault(section, {})
        if isinstance(settings, dict) and name not in settings and not (name == "epochs" and settings.get("steps")):
            settings[name] = value
            document.origins[(section, name)] = "Open-Sora's default"


def our_key(cls: type, key: str) -> str | None:
    """Our key for one of Open-Sora's that is not ours as well; `None` when there is none."""
    rules = TRAIN_RULES if cls is TrainConfig else SAMPLE_RULES
    return next((rule.target for rule in rules if rule.key == key and rule.target != key), None)
