"""Attempts on one rank in the test's own process: without a launcher, and without the seconds that a start takes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from training_runs import Run

import opensora.train
from opensora.config.flags import parse_train_command
from opensora.config.load import load_train_config
from opensora.config.train import TrainConfig
from opensora.training.control import StopControl
from opensora.training.position import Position


def config_of(run: Run, *overrides: str) -> TrainConfig:
    """The settings of an attempt."""
    command = run.command(1, *overrides)
    parsed = parse_train_command(command[command.index("opensora.train") + 1 :])
    return load_train_config(parsed.config, parsed.overrides, flags=parsed.flags)


def train_here(config: TrainConfig) -> None:
    """An attempt.

    Raises:
        OpenSoraError: what ended it.
    """
    position = Position(0)
    num_threads = torch.get_num_threads()
    try:
        opensora.train.run(config, control=StopControl(position), position=position)
    finally:
        torch.set_num_threads(num_threads)
        # An attempt that fails leaves its groups behind, as its process would have ended.
        if dist.is_initialized():
            dist.destroy_process_group()
