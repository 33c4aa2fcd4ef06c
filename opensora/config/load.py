"""Read, check and write the settings of a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from opensora.config.documents import Document, KeyPath, describe, parse_document, read_document, write_yaml
from opensora.config.opensora_keys import SAMPLE_RULES, TRAIN_RULES, KeyRule, map_file_keys, map_flags
from opensora.config.overrides import apply_overrides
from opensora.config.sample import SampleConfig
from opensora.config.search import SearchConfig
from opensora.config.train import TrainConfig
from opensora.config.typed import Problem, build, config_from_mapping, raise_problems

__all__ = [
    "config_from_mapping",
    "dump_config",
    "load_sample_config",
    "load_search_config",
    "load_train_config",
    "parse_train_config",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TRAIN_RIVALS = ((("train.steps",), ("train.epochs",)),)
_SAMPLE_RIVALS = ((("prompt",), ("prompt_path",)), (("image_size",), ("resolution", "aspect_ratio")))
"""Groups of settings that exclude each other."""


def load_train_config(
    path: str | None, overrides: Sequence[str] = (), *, flags: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The settings of a training run.

    Args:
        path: a `.yaml`, `.yml`, `.json` or `.py` file; `None` when all settings are on the command line.
        overrides: `key=value`, over everything else.
        flags: Open-Sora's flags (see `opensora.config.flags`), over the file; `None` values are not set.

    Raises:
        ConfigError: with everything that is wrong, each with key, value, origin and remedy.
    """
    document = read_document(path) if path is not None else Document("command line", {})
    return _load(TrainConfig, document, TRAIN_RULES, flags or {}, overrides, _TRAIN_RIVALS)


def load_sample_config(
    path: str | None, overrides: Sequence[str] = (), *, flags: Mapping[str, Any] | None = None
) -> SampleConfig:
    """The settings of sampling; arguments and errors as for `load_train_config`."""
    document = read_document(path) if path is not None else Document("command line", {})
    return _load(SampleConfig, document, SAMPLE_RULES, flags or {}, overrides, _SAMPLE_RIVALS)


def load_search_config(flags: Mapping[str, Any]) -> SearchConfig:
    """The settings of the batch-size search, which are flags alone.

    Raises:
        ConfigError: with everything that is wrong.
    """
    return config_from_mapping(SearchConfig, flags, source="command line")


def parse_train_config(text: str, *, source: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings in YAML or JSON text, for example the `config.yaml` of a run directory.

    Raises:
        ConfigError: with everything that is wrong.
    """
    return _load(TrainConfig, parse_document(text, name=source), TRAIN_RULES, {}, overrides, _TRAIN_RIVALS)


def dump_config(config: Any) -> str:
    """YAML of all settings, defaults included; reading it gives an equal config."""
    return write_yaml(_plain(dataclasses.asdict(config)))


def _load(
    cls: type[T],
    document: Document,
    rules: Sequence[KeyRule],
    flags: Mapping[str, Any],
    overrides: Sequence[str],
    rivals: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
) -> T:
    problems: list[Problem] = []
    map_file_keys(rules, document, problems)
    written = map_flags(rules, document, flags, problems)
    written += apply_overrides(cls, document, overrides, problems)
    _retire_rivals(document, written, rivals)
    config = build(cls, document, problems)
    raise_problems(problems)
    assert config is not None
    return config


def _retire_rivals(
    document: Document, written: Sequence[KeyPath], rivals: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]
) -> None:
    """Where the command line sets one of two settings that exclude each other, unset the other one of the file."""
    set_by_user = {".".join(path) for path in written if _get(document.values, path) is not None}
    for pair in rivals:
        for winners, losers in (pair, pair[::-1]):
            if not set_by_user.intersection(winners) or set_by_user.intersection(losers):
                continue
            for key in losers:
                path = tuple(key.split("."))
                value = _get(document.values, path)
                if value is None:
                    continue
                winner = next(key for key in winners if key in set_by_user)
                logger.info("%s=%s (%s) gives way to %s", key, describe(value), document.where(path), winner)
                container = document.values if len(path) == 1 else document.values[path[0]]
                container[path[-1]] = None


def _get(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
