"""Open-Sora's module of sampling helpers; they live in `opensora.sampling`."""

from opensora.sampling.pipeline import prepare_multi_resolution_info
from opensora.sampling.prompts import (
    append_score_to_prompts,
    extract_json_from_prompts,
    extract_prompts_loop,
    load_prompts,
    merge_prompt,
    split_prompt,
)
from opensora.sampling.references import (
    append_generated,
    apply_mask_strategy,
    collect_references_batch,
    dframe_to_frame,
    parse_mask_strategy,
)

__all__ = [
    "append_generated",
    "append_score_to_prompts",
    "apply_mask_strategy",
    "collect_references_batch",
    "dframe_to_frame",
    "extract_json_from_prompts",
    "extract_prompts_loop",
    "load_prompts",
    "merge_prompt",
    "parse_mask_strategy",
    "prepare_multi_resolution_info",
    "split_prompt",
]
