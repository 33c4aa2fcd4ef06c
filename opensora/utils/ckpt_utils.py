"""Open-Sora's module of checkpoint helpers; weights are read in `opensora.models.weights`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from opensora.errors import CheckpointError
from opensora.models.weights import load_weights


def load_checkpoint(
    model: nn.Module, ckpt_path: str, save_as_pt: bool = False, model_name: str = "model", strict: bool = False
) -> None:
    """Fill a model with the weights of a file, or of a checkpoint folder.

    Args:
        ckpt_path: `.pt`, `.pth`, `.bin` or `.safetensors` file, or a folder; local or in a bucket.
        save_as_pt: also write what a local folder holds as `<folder>/<model_name>_ckpt.pt`.
        model_name: subfolder of a local folder with the weights, when there is one of that name.
        strict: every weight must be there and no other; otherwise differences are logged.

    Raises:
        CheckpointError: nothing readable is there, or it does not fit; or `save_as_pt` without a local folder.
    """
    folder = Path(ckpt_path)
    if save_as_pt and not folder.is_dir():
        raise CheckpointError(
            f"save_as_pt=True: {ckpt_path} is no local folder to write {model_name}_ckpt.pt to",
            hint="leave it out, or copy the folder here first",
        )
    weights = folder / model_name
    load_weights(model, str(weights) if weights.is_dir() else ckpt_path, strict=strict)
    if save_as_pt:
        torch.save(model.state_dict(), folder / f"{model_name}_ckpt.pt")


__all__ = ["load_checkpoint"]
