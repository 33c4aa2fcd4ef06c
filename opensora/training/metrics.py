"""What is measured while training: declared names and units, written to JSON lines and TensorBoard."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opensora import records
from opensora.config.train import ReportConfig
from opensora.errors import MissingExtraError
from opensora.spool import FolderSpool, PartSpool
from opensora.storage import Storage

logger = logging.getLogger(__name__)

METRICS: dict[str, str] = {
    "loss": "step loss, the mean defined by train.loss_weighting",
    "validation_loss": "mean loss of the held-out clips over the measured times",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate",
    "epoch": "epoch of the step, from 0",
    "step_seconds": "duration of the step",
    "samples_per_second": "clips trained on, over all ranks",
    "tokens_per_second": "latent patches trained on, over all ranks",
    "tflops": "TFLOP/s of forward and backward pass over all ranks, from shapes",
    "mfu": "share of the device's peak that these are (on known GPUs)",
    "data_wait_share": "share of the step that this rank waited for clips",
    "imbalance_share": "share of the step that this rank waited for other ranks",
    "memory_gib": "peak memory of the process, or of its GPU",
    "skipped_clips": "clips left out so far in this attempt because they could not be read, over all ranks",
    "goodput": "share of the elapsed time spent on encoding, forward, backward and optimiser",
    "seconds/*": "seconds since the start of the attempt by phase; they add up to the elapsed time",
}
"""Every name that may be logged, with its meaning and unit."""

PEAK_TFLOPS = {"H200": 989.5, "H100": 989.5, "H800": 989.5, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bf16 peaks by part of the device's name (vendors' data sheets)."""


def known_name(name: str) -> bool:
    family, slash, _ = name.partition("/")
    return name in METRICS or (bool(slash) and f"{family}/*" in METRICS)


def peak_tflops(device: torch.device) -> float | None:
    """The dense bf16 peak of a known GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process on its device; of the process itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, where training is not supported
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsWriter:
    """Writes metrics of rank 0. An unreachable store delays them and never stops the run."""

    def __init__(self, run: Storage, *, attempt: int, config: ReportConfig, run_config: Mapping[str, Any]) -> None:
        # First, since it may fail: what is begun below would be left behind.
        self._wandb = _start_wandb(run, run_config) if config.wandb else None
        # TensorBoard takes a second to import, and only rank 0 writes it.
        from torch.utils.tensorboard import SummaryWriter

        self._lines = PartSpool(
            run, records.metrics_prefix(attempt), suffix=".jsonl", flush_seconds=config.flush_seconds
        )
        self._folder = Path(tempfile.mkdtemp(prefix="opensora-tensorboard-"))
        self._tensorboard = SummaryWriter(str(self._folder), flush_secs=max(1, int(config.flush_seconds / 2)))
        self._uploads = FolderSpool(run, records.TENSORBOARD_PREFIX, self._folder, flush_seconds=config.flush_seconds)

    def write(self, step: int, values: Mapping[str, float], *, everywhere: bool) -> None:
        """Log values of a step.

        Args:
            step: number of optimiser steps done, this one included.
            everywhere: to TensorBoard as well, and not only as a line of JSON.
        """
        for name, value in values.items():
            assert known_name(name), f"{name} is not declared in METRICS"
            if everywhere:
                self._tensorboard.add_scalar(name, value, step)
        # JSON has no NaN.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"time": round(time.time(), 3), "step": step, **finite}) + "\n")
        if self._wandb is not None and everywhere:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        self._tensorboard.close()
        self._uploads.close()
        self._lines.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(run: Storage, run_config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # optional
    except ImportError:
        raise MissingExtraError("report.wandb=true", extra="wandb") from None
    # A later attempt continues the curves of the one before: the run's URI says that they belong together.
    run_id = hashlib.blake2b(run.uri.encode(), digest_size=8).hexdigest()
    name = run.uri.rsplit("/", 1)[-1]
    return wandb.init(project="Open-Sora", name=name, id=run_id, config=dict(run_config), resume="allow")
