"""Scripts written against Open-Sora 1.2 find the sampling helpers where they were."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from opensora.errors import CheckpointError
from opensora.utils.ckpt_utils import load_checkpoint

HELPERS = [
    "prepare_multi_resolution_info",
    "load_prompts",
    "append_score_to_prompts",
    "extract_json_from_prompts",
    "collect_references_batch",
    "extract_prompts_loop",
    "split_prompt",
    "merge_prompt",
    "parse_mask_strategy",
    "apply_mask_strategy",
    "append_generated",
    "dframe_to_frame",
]


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("opensora.utils.inference_utils", HELPERS),
        ("opensora.utils.train_utils", ["MaskGenerator"]),
        ("opensora.schedulers.rf", ["RFLOW"]),
        ("opensora.utils.ckpt_utils", ["load_checkpoint"]),
        (
            "opensora.datasets",
            ["save_sample", "read_from_path", "prepare_dataloader", "VideoTextDataset", "VariableVideoTextDataset"],
        ),
    ],
)
def test_names_are_where_scripts_import_them(module: str, names: list[str]) -> None:
    assert all(callable(getattr(importlib.import_module(module), name)) for name in names)


def test_load_checkpoint_reads_files_and_folders_and_writes_the_single_file(tmp_path: Path) -> None:
    saved, model = nn.Linear(3, 2), nn.Linear(3, 2)
    (tmp_path / "model").mkdir()
    torch.save(saved.state_dict(), tmp_path / "model" / "weights.pt")
    load_checkpoint(model, str(tmp_path), save_as_pt=True)
    assert torch.equal(model.weight, saved.weight)
    again = nn.Linear(3, 2)
    load_checkpoint(again, str(tmp_path / "model_ckpt.pt"), strict=True)
    assert torch.equal(again.bias, saved.bias)


def test_load_checkpoint_tolerates_missing_names_unless_strict(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match="1 missing: bias"):
        load_checkpoint(model, str(tmp_path / "half.pt"), strict=True)
    load_checkpoint(model, str(tmp_path / "half.pt"))
    assert torch.equal(model.weight, torch.ones(2, 3))
    with pytest.raises(CheckpointError, match="no local folder"):
        load_checkpoint(model, str(tmp_path / "half.pt"), save_as_pt=True)
