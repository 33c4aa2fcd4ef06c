"""Read, check and write the settings of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from opensora.config.documents import Document, parse_document, read_document, write_yaml
from opensora.config.overrides import apply_overrides
from opensora.config.train import TrainConfig
from opensora.config.typed import Problem, build, config_from_mapping, raise_problems

__all__ = ["config_from_mapping", "dump_config", "load_train_config", "parse_train_config"]


def load_train_config(path: str | None, overrides: Sequence[str] = (), *, flags: Mapping[str, Any] = {}) -> TrainConfig:
    document = read_document(path) if path is not None else Document("command line", {})
    problems: list[Problem] = []
    apply_overrides(TrainConfig, document, overrides, problems)
    config = build(TrainConfig, document, problems)
    raise_problems(problems)
    assert config is not None
    return config


def parse_train_config(text: str, *, source: str) -> TrainConfig:
    """The settings in YAML or JSON text, for example the `config.yaml` of a run directory.

    Raises:
        ConfigError: with everything that is wrong.
    """
    document = parse_document(text, name=source)
    problems: list[Problem] = []
    config = build(TrainConfig, document, problems)
    raise_problems(problems)
    assert config is not None
    return config


def dump_config(config: Any) -> str:
    """YAML of all settings, defaults included; reading it gives an equal config."""
    return write_yaml(_plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
