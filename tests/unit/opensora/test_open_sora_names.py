"""Scripts written against Open-Sora 1.2 find the sampling helpers where they were."""

from __future__ import annotations

import importlib

import pytest

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
        ("opensora.datasets", ["save_sample", "read_from_path"]),
    ],
)
def test_names_are_where_scripts_import_them(module: str, names: list[str]) -> None:
    assert all(callable(getattr(importlib.import_module(module), name)) for name in names)
