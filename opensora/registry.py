"""Type names of configs and what they build. One table per kind, resolved when something is built.

Importing this module imports no model and no torch.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from opensora.errors import ConfigError


class Registry:
    """A table from type name to "module:attribute"."""

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._table = dict(table)

    def names(self) -> list[str]:
        return sorted(self._table)

    def resolve(self, name: str) -> Any:
        """The class or factory behind a type name.

        Raises:
            ConfigError: the name is unknown; the message lists the known ones.
        """
        if name not in self._table:
            close = difflib.get_close_matches(name, self._table, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known types: {', '.join(self.names())}"
            raise ConfigError(f"unknown {self.kind} type {name!r}; known types: {', '.join(self.names())}", hint=hint)
        module, _, attribute = self._table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def build(self, cfg: Mapping[str, Any], **defaults: Any) -> Any:
        """Build `{"type": name, **keywords}`; keywords of `cfg` win over `defaults`."""
        keywords = {**defaults, **copy.deepcopy(dict(cfg))}
        try:
            name = keywords.pop("type")
        except KeyError:
            raise ConfigError(f"a {self.kind} config needs a `type`; known types: {', '.join(self.names())}") from None
        return self.resolve(name)(**keywords)


MODELS = Registry(
    "model",
    {
        "STDiT3": "opensora.models.stdit.stdit3:STDiT3",
        "STDiT3-XL/2": "opensora.models.stdit.stdit3:STDiT3_XL_2",
        "STDiT3-3B/2": "opensora.models.stdit.stdit3:STDiT3_3B_2",
        "codec": "opensora.models.vae.codec:VideoCodec",
        "hash": "opensora.models.text_encoder.hash:HashTextEncoder",
        "minilm": "opensora.models.text_encoder.minilm:MiniLMTextEncoder",
    },
)
"""Diffusion models, VAEs and text encoders share one table, as in Open-Sora."""

SCHEDULERS = Registry("scheduler", {"rflow": "opensora.schedulers.rf:RFLOW"})

DATASETS = Registry(
    "dataset",
    {
        "VariableVideoTextDataset": "opensora.datasets.datasets:VariableVideoTextDataset",
        "VideoTextDataset": "opensora.datasets.datasets:VideoTextDataset",
    },
)
"""For scripts of Open-Sora's kind. A run reads the clips that its `data` settings describe."""


def build_module(module: Any, builder: Registry, **kwargs: Any) -> Any:
    """Open-Sora's builder: `None` stays `None`, a built object is returned as it is, `kwargs` win over the config.

    Raises:
        TypeError: `module` is neither a config mapping nor a module.
    """
    if module is None:
        return None
    if isinstance(module, Mapping):
        return builder.build({**module, **kwargs})
    if hasattr(module, "parameters") and callable(module.parameters):
        return module
    raise TypeError(f"expected a {builder.kind} config or module, got {type(module).__name__}")
