"""The config of a run as its ranks will read it: the same text, with the operator's overrides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opensora_operator.resources import CONFIG_KEY

from osctl.forecast import Forecast

if TYPE_CHECKING:  # slow to import
    from opensora.config.train import TrainConfig

_TRAIN = "opensora.train"


def why_unknown(planned: Forecast) -> str | None:
    """Why the config cannot be read here; None where it can."""
    program, path, *_ = _arguments(planned)
    if program != _TRAIN:
        return f"the config of {program} is not checked"
    if CONFIG_KEY not in _data(planned):
        return f"the config {path} is in the image: it is not checked"
    return None


def config_of(planned: Forecast) -> TrainConfig | None:
    """The config; None where it cannot be read here.

    Raises:
        ConfigError: it is wrong.
    """
    from opensora.config.load import parse_train_config  # slow to import

    if why_unknown(planned) is not None:
        return None
    _, _, *overrides = _arguments(planned)
    return parse_train_config(_data(planned)[CONFIG_KEY], source="spec.config", overrides=overrides)


def _arguments(planned: Forecast) -> list[str]:
    job = next(manifest for manifest in planned.objects if manifest["kind"] == "Job")
    arguments: list[str] = job["spec"]["template"]["spec"]["containers"][0]["args"]
    return arguments


def _data(planned: Forecast) -> dict[str, str]:
    data: dict[str, str] = next(manifest for manifest in planned.objects if manifest["kind"] == "ConfigMap")["data"]
    return data
