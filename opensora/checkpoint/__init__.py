"""Distributed checkpoints through storage: write, commit, find the newest complete one, load, export.

- `manifest`: what a checkpoint is in a run directory, which ones are complete, which ones may go;
- `transfer`: how tensors become objects and come back, behind the interfaces of `torch.distributed.checkpoint`;
- `manager`: when: copying in the loop's thread, writing in the background, committing, retention;
- `export`: whole tensors for other programs.

The names below are found on first use, so that importing `manifest` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opensora.checkpoint.export import export_safetensors, read_checkpoint_tensors
    from opensora.checkpoint.manager import CheckpointManager, SaveTicket
    from opensora.checkpoint.manifest import CheckpointInfo, DataObject, Manifest, find_checkpoints

__all__ = [
    "CheckpointInfo",
    "CheckpointManager",
    "DataObject",
    "Manifest",
    "SaveTicket",
    "export_safetensors",
    "find_checkpoints",
    "read_checkpoint_tensors",
]

_MODULES = {
    "export": ("export_safetensors", "read_checkpoint_tensors"),
    "manager": ("CheckpointManager", "SaveTicket"),
    "manifest": ("CheckpointInfo", "DataObject", "Manifest", "find_checkpoints"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"opensora.checkpoint.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
