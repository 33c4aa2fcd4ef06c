"""Whole tensors out of a training state: safetensors for other programs, and checkpoints read by a single process."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opensora.checkpoint.manifest import CheckpointInfo
from opensora.checkpoint.transfer import CheckpointReader, ValueLoadPlanner, load_alone
from opensora.errors import CheckpointError
from opensora.storage import Storage


def export_safetensors(
    state: dict[str, torch.Tensor],
    storage: Storage,
    path: str,
    *,
    metadata: dict[str, str],
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write whole tensors under their names as safetensors. Called by one rank.

    More than `shard_bytes` are split, in the order of `state`, into `NAME-00001-of-00003.safetensors` …, with
    `NAME.safetensors.index.json` written last, as the Hugging Face libraries do; a tensor is never split.

    Args:
        state: plain tensors on any device.
        path: ends with `.safetensors`.
        metadata: written into the header of each file.
    """
    stem = path.removesuffix(".safetensors")
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(shards[0], storage, path, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        shard_path = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, storage, shard_path, metadata)
        weight_map.update(dict.fromkeys(shard, shard_path.rpartition("/")[2]))
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
    storage.write(f"{path}.index.json", json.dumps(index, indent=1).encode())


def _write_file(tensors: dict[str, torch.Tensor], storage: Storage, path: str, metadata: dict[str, str]) -> None:
    # Through a local file: the library's other way holds a second copy of everything in memory.
    with tempfile.TemporaryDirectory(prefix="opensora-export-") as folder:
        local = Path(folder, "tensors.safetensors")
        save_file({name: _alone(tensor) for name, tensor in tensors.items()}, local, metadata=metadata)
        storage.upload(local, path)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous host tensor that shares its memory with no other, as the format demands."""
    host = tensor.detach().cpu().contiguous()
    return host if host.untyped_storage().nbytes() == host.nbytes else host.clone()


def read_checkpoint_tensors(run: Storage, info: CheckpointInfo, *, prefix: str) -> dict[str, torch.Tensor]:
    """Read the whole tensors whose names start with a prefix, in one process, whatever the number of ranks that saved.

    Names stay as saved, with the prefix. Only the objects that hold such tensors are read.

    Raises:
        CheckpointError: no tensor has such a name, or the checkpoint is damaged.
    """
    reader = CheckpointReader(run.child(info.path), info.manifest)
    entries = reader.metadata.state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not state:
        known = sorted({name.partition(".")[0] for name in entries})
        raise CheckpointError(
            f"{run.uri_of(info.path)} has no tensor whose name starts with {prefix!r}",
            hint=f"its names start with {', '.join(known)}",
        )
    load_alone(state, reader, ValueLoadPlanner())
    return state
