"""Reads published and exported weights into a model: safetensors, PyTorch files, folders of shards; local or remote.

Nothing is executed from a file (`weights_only`), and a model is changed only when everything fits.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opensora.errors import CheckpointError

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
WRAPPING_KEYS = ("state_dict", "ema", "model", "module")
"""Names under which training scripts of the field store the weights beside other state."""
RECOMPUTED = ("pos_embed", "pos_embed_temporal", "temp_embed", "embeddings.position_ids")
"""Position tables that some published files carry; models compute theirs from the configuration."""
MAX_GROUPS = 12
"""Groups of names that an error message lists."""


def load_weights(module: nn.Module, uri: str, *, strict: bool = True) -> None:
    """Fill a module with the weights at `uri`.

    Args:
        module: Where they go; left unchanged when they do not fit.
        uri: A `.safetensors`, `.pt`, `.pth` or `.bin` file, or a folder with one of them or with shards and their
            index; a local path or an address that `opensora.storage` opens.
        strict: Every weight of the module must be there, and no other. Otherwise differences are logged.

    Raises:
        CheckpointError: nothing readable is there, or it does not fit.
    """
    if "://" in uri and not uri.startswith("file://"):
        with tempfile.TemporaryDirectory(prefix="opensora-weights-") as folder:
            state = _read(_fetch(uri, Path(folder)))
            _fill(module, state, uri=uri, strict=strict)
    else:
        _fill(module, _read(Path(uri.removeprefix("file://"))), uri=uri, strict=strict)


def _fetch(uri: str, folder: Path) -> Path:
    """Copy a remote file, or what weights a remote folder holds, to a local folder."""
    # Storage is needed for remote weights only, and its libraries take long to import.
    from opensora.storage import Storage, locate

    if uri.endswith(SUFFIXES):
        storage, name = locate(uri)
        storage.download(name, folder / name)
        return folder / name
    storage = Storage(uri)
    for info in storage.list():
        if info.path.endswith((*SUFFIXES, ".index.json")):
            (folder / info.path).parent.mkdir(parents=True, exist_ok=True)
            storage.download(info.path, folder / info.path)
    return folder


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or folder, by name."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"there are no weights at {path}", hint="check the path")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is not a weight file", hint=f"known endings: {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}", hint=_diagnose(path)) from error
    for key in WRAPPING_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} holds something other than named tensors", hint="export the model's state_dict")
    return dict(loaded)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    indices = sorted(folder.glob("*.index.json"), key=lambda path: ("safetensors" not in path.name, path.name))
    if indices:
        return _read_shards(indices[0])
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) == 1:
        return _read(files[0])
    if not files and (folder / "model").is_dir():
        return _read_folder(folder / "model")
    raise CheckpointError(
        f"{folder} holds {len(files)} weight files and no index",
        hint="name one file" if files else f"known endings: {', '.join(SUFFIXES)}",
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {_first_line(error)}") from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        state.update(_read(index.parent / name))
    missing = sorted(set(weight_map) - set(state))
    if missing:
        raise CheckpointError(f"the shards beside {index} lack {_group(missing)}", hint="copy the whole folder again")
    return state


def _diagnose(path: Path) -> str:
    """What usually lies behind a file that cannot be read."""
    with path.open("rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<")):
        return "this is a web page: the address was wrong, or the download needs a login"
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if not start:
        return "the file is empty: copy it again"
    return "the file is cut off or damaged, or holds more than tensors: copy it again, or convert it to safetensors"


def _fill(module: nn.Module, state: dict[str, Tensor], *, uri: str, strict: bool) -> None:
    own = module.state_dict()
    state = _adapt(state, own)
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(set(own) & set(state))
        if state[name].shape != own[name].shape
    ]
    differences = [
        f"{len(names)} {kind}: {_group(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if shapes or (strict and differences):
        raise CheckpointError(
            f"the weights at {uri} do not fit {type(module).__name__}; " + "; ".join(differences),
            hint="build the model with the settings that the weights were trained with",
        )
    if differences:
        logger.warning("weights at %s: %s", uri, "; ".join(differences))
    module.load_state_dict(state, strict=False)


def _adapt(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring published image models and other caption lengths to the layout of `own`."""
    state = {name: value for name, value in state.items() if name in own or name not in RECOMPUTED}
    if any(name.startswith("spatial_blocks.") for name in own):  # PixArt-Σ into the spatial half of STDiT3
        state = {re.sub(r"^blocks\.", "spatial_blocks.", name): value for name, value in state.items()}
    patch = "x_embedder.proj.weight"
    if patch in state and patch in own and state[patch].ndim == 4 and own[patch].ndim == 5:
        state[patch] = state[patch].unsqueeze(2)
    null = "y_embedder.y_embedding"
    if null in state and null in own and state[null].shape[1:] == own[null].shape[1:]:
        length, have = own[null].shape[0], state[null].shape[0]
        if have != length:
            logger.info("the null caption of %d tokens is brought to %d", have, length)
            state[null] = torch.cat((state[null][:length], state[null][-1:].expand(max(0, length - have), -1)))
    return state


def _group(names: Iterable[str]) -> str:
    """Names that differ in their numbers only are given once."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    shown = [found[0] if len(found) == 1 else f"{pattern} (x{len(found)})" for pattern, found in groups.items()]
    return ", ".join(shown[:MAX_GROUPS]) + (f" and {len(shown) - MAX_GROUPS} more" if len(shown) > MAX_GROUPS else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
