"""Batch sizes from a table that a search has measured (`data.batch_table`)."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import torch

from opensora import __version__
from opensora.acceleration.mesh import World
from opensora.config.train import TrainConfig
from opensora.datasets.batch_table import (
    BatchTable,
    check_facts,
    facts_of,
    read_batch_table,
    with_batch_sizes,
)
from opensora.errors import ConfigError
from opensora.records import BATCH_TABLE_PATH
from opensora.storage import Storage

logger = logging.getLogger(__name__)


def use_batch_table(config: TrainConfig, world: World, run: Storage) -> TrainConfig:
    """The config with the batch sizes of its table; as it is where it names none.

    The sizes become part of the config, so that `config.yaml` repeats the run without the table. The table, and with it
    the evidence, is copied into the run directory.

    Raises:
        ConfigError: there is no table, it lacks a bucket, or it was measured for something else.
    """
    uri = config.data.batch_table
    if uri is None:
        return config
    # Read once: ranks that saw different tables would plan different steps.
    table = world.broadcast(_read(uri, config) if world.is_main else None)
    facts = facts_of(config, ranks=world.size, accelerator=accelerator_name(world.device))
    warnings = [*check_facts(table, facts, uri=uri), *_other_versions(table)]
    buckets = with_batch_sizes(config.data.bucket_config, table, uri=uri)
    if world.is_main:
        logger.info("batch sizes from %s (%s): %s", uri, table.key[:16], json.dumps(buckets))
        for warning in warnings:
            logger.warning("%s: %s", uri, warning)
        run.write(BATCH_TABLE_PATH, table.to_json().encode())
    return replace(config, data=replace(config.data, bucket_config=buckets, batch_table=None))


def accelerator_name(device: torch.device) -> str:
    """What a table calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _read(uri: str, config: TrainConfig) -> BatchTable:
    table = read_batch_table(uri, storage=config.storage)
    if table is None:
        raise ConfigError(
            f"data.batch_table={uri!r} does not exist",
            hint="make it: python -m opensora.search_batch_size CONFIG --output " + uri,
        )
    return table


def _other_versions(table: BatchTable) -> list[str]:
    here = {"opensora": __version__, "torch": torch.__version__}
    return [
        f"measured with {name} {table.facts[name]}, not {version}"
        for name, version in here.items()
        if table.facts.get(name, version) != version
    ]
