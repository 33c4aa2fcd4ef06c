"""The prompt syntax: prompts that change from loop to loop, references in JSON, scores at the end.

`|0|a cat|2|a dog {"reference_path": "cat.png", "mask_strategy": "0"}` is a cat in the first two loops and a dog from
the third on, and starts from a picture. Nothing here needs torch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence

from opensora.config.train import StorageConfig
from opensora.errors import DataError, ObjectNotFoundError
from opensora.sampling.cleaning import text_preprocessing
from opensora.storage import locate

_JSON_KEYS = ("reference_path", "mask_strategy")


def load_prompts(
    prompt_path: str,
    start_idx: int | None = None,
    end_idx: int | None = None,
    *,
    config: StorageConfig | None = None,
) -> list[str]:
    """The prompts of a file: a text file has one per line, blank lines left out; a CSV or Parquet file has a column
    `text`. The range is taken from them.

    Raises:
        DataError: the file is missing, cannot be read, or has no prompt in the range.
    """
    storage, name = locate(prompt_path, config=config or StorageConfig())
    try:
        data = storage.read(name)
    except ObjectNotFoundError as error:
        raise DataError(f"prompt file {prompt_path} does not exist", hint="check --prompt-path") from error
    prompts = _read_table(data, prompt_path) if name.endswith((".csv", ".parquet")) else _read_lines(data, prompt_path)
    chosen = prompts[start_idx:end_idx]
    if not chosen:
        raise DataError(
            f"prompt file {prompt_path} has {len(prompts)} prompts, none of them from index {start_idx or 0} "
            f"to {'the end' if end_idx is None else end_idx}",
            hint="write one prompt per line; check --start-index and --end-index",
        )
    return chosen


def _read_lines(data: bytes, path: str) -> list[str]:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"prompt file {path} is not UTF-8 text", hint="save it as UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def _read_table(data: bytes, path: str) -> list[str]:
    # Takes a while to load, and few jobs need it.
    import pyarrow
    from pyarrow import csv, parquet

    try:
        if path.endswith(".parquet"):
            column = parquet.read_table(pyarrow.BufferReader(data), columns=["text"])["text"]
        else:
            column = csv.read_csv(
                pyarrow.BufferReader(data),
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(include_columns=["text"], column_types={"text": pyarrow.string()}),
            )["text"]
    except (pyarrow.ArrowException, KeyError) as error:
        raise DataError(
            f"prompt file {path} has no readable column `text`: {str(error).splitlines()[0]}",
            hint="name the column of prompts `text`, or give a text file with one prompt per line",
        ) from error
    return [str(text or "") for text in column.to_pylist()]


def split_prompt(prompt_text: str) -> tuple[list[str], list[int] | None]:
    """`|0|a|2|b` → (["a", "b"], [0, 2]); a prompt without loop marks → ([prompt], None).

    Raises:
        DataError: a mark is not a number, or they do not increase.
    """
    if not prompt_text.startswith("|0|"):
        return [prompt_text], None
    parts = prompt_text.split("|")[1:]
    marks, texts = parts[0::2], [text.strip() for text in parts[1::2]]
    if len(marks) != len(texts) or not all(mark.strip().isdecimal() for mark in marks):
        raise DataError(f"prompt {prompt_text!r}: loop marks must be |number|", hint="for example |0|a cat|2|a dog")
    loops = [int(mark) for mark in marks]
    if any(later <= earlier for earlier, later in itertools.pairwise(loops)):
        raise DataError(f"prompt {prompt_text!r}: loop marks {loops} do not increase", hint="order the segments")
    return texts, loops


def merge_prompt(text_list: Sequence[str], loop_idx_list: Sequence[int] | None = None) -> str:
    """The inverse of `split_prompt`."""
    if loop_idx_list is None:
        return text_list[0]
    return "".join(f"|{loop}|{text}" for loop, text in zip(loop_idx_list, text_list, strict=True))


def extract_prompts_loop(prompts: Sequence[str], num_loop: int) -> list[str]:
    """What each prompt says in loop `num_loop`: its last segment that starts at or before it."""
    chosen = []
    for prompt in prompts:
        texts, loops = split_prompt(prompt)
        chosen.append(texts[sum(loop <= num_loop for loop in loops) - 1] if loops else prompt)
    return chosen


def extract_json_from_prompts(
    prompts: Sequence[str], reference: list[str], mask_strategy: list[str]
) -> tuple[list[str], list[str], list[str]]:
    """Take the JSON at the end of each prompt off, into the reference and mask strategy of that prompt.

    Returns:
        New lists: texts, references, mask strategies.

    Raises:
        DataError: more than one `{`, text that is not JSON, or a key other than `reference_path`, `mask_strategy`.
    """
    texts, reference, mask_strategy = [], list(reference), list(mask_strategy)
    for i, prompt in enumerate(prompts):
        text, *rest = re.split(r"(?=\{)", prompt)
        if len(rest) > 1:
            raise DataError(f"prompt {prompt!r} has more than one '{{'", hint="only the JSON at its end may have one")
        texts.append(text)
        if not rest:
            continue
        try:
            values = json.loads(rest[0])
        except json.JSONDecodeError as error:
            raise DataError(
                f"prompt {prompt!r}: {rest[0]!r} is not JSON ({error})",
                hint='for example a cat {"reference_path": "cat.png", "mask_strategy": "0"}',
            ) from error
        for key, value in values.items():
            if key not in _JSON_KEYS or not isinstance(value, str):
                raise DataError(
                    f"prompt {prompt!r}: {key!r}: {value!r} is not known", hint=f"known: texts for {_JSON_KEYS}"
                )
        reference[i] = values.get("reference_path", reference[i])
        mask_strategy[i] = values.get("mask_strategy", mask_strategy[i])
    return texts, reference, mask_strategy


def append_score_to_prompts(
    prompts: Sequence[str],
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
) -> list[str]:
    """Add the tail that training captions have, each part unless the prompt already has it."""
    tails = [
        ("aesthetic score:", None if aes is None else f"{aes:.1f}"),
        ("motion score:", None if flow is None else f"{flow:.1f}"),
        ("camera motion:", camera_motion),
    ]
    scored = []
    for prompt in prompts:
        for name, value in tails:
            if value is not None and name not in prompt:
                prompt = f"{prompt} {name} {value}."
        scored.append(prompt)
    return scored


def prepare_prompt(
    prompt: str,
    *,
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
    clean: bool = True,
) -> str:
    """Scores and cleaning for every segment of a prompt (its JSON already taken off)."""
    texts, loops = split_prompt(prompt)
    texts = append_score_to_prompts(texts, aes, flow, camera_motion)
    return merge_prompt([text_preprocessing(text) if clean else text for text in texts], loops)
