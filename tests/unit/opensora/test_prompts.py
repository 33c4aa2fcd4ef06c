"""Prompt syntax and caption cleaning."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pytest
from pyarrow import csv, parquet

from opensora.errors import DataError
from opensora.sampling.cleaning import text_preprocessing
from opensora.sampling.prompts import (
    append_score_to_prompts,
    extract_json_from_prompts,
    extract_prompts_loop,
    load_prompts,
    merge_prompt,
    prepare_prompt,
    split_prompt,
)

SCORED = "a cat. aesthetic score: 6.5. motion score: 5.0. camera motion: pan right."


@pytest.mark.parametrize(("loop", "text"), [(0, "a"), (1, "a"), (2, "b"), (3, "b"), (9, "b")])
def test_a_segment_lasts_until_the_next_one(loop: int, text: str) -> None:
    assert extract_prompts_loop(["|0|a|2|b", "plain"], loop) == [text, "plain"]


def test_splitting_and_merging_are_inverse() -> None:
    assert split_prompt("|0| a day |2|night") == (["a day", "night"], [0, 2])
    assert merge_prompt(*split_prompt("|0|a|2|b")) == "|0|a|2|b"
    assert split_prompt("a | b") == (["a | b"], None)


@pytest.mark.parametrize("prompt", ["|0|a|two|b", "|0|a|2", "|0|a|0|b", "|0|a|3|b|2|c"])
def test_wrong_loop_marks_are_named(prompt: str) -> None:
    with pytest.raises(DataError, match="loop marks"):
        split_prompt(prompt)


def test_json_at_the_end_of_a_prompt_sets_its_reference_and_mask() -> None:
    prompts = ['a cat{"reference_path": "p1;p2", "mask_strategy": "0;0,1,0,-1,1"}', "a dog", 'x {"mask_strategy": "1"}']
    given = ["", "dog.png", "x.png"]
    texts, references, masks = extract_json_from_prompts(prompts, given, ["", "", ""])
    assert texts == ["a cat", "a dog", "x "]
    assert references == ["p1;p2", "dog.png", "x.png"]
    assert masks == ["0;0,1,0,-1,1", "", "1"]
    assert given == ["", "dog.png", "x.png"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ('a {"reference": "x"}', "'reference'"),
        ('a {"reference_path": 3}', "3"),
        ("a {b} c", "not JSON"),
        ('a {"reference_path": {"x": "y"}}', "more than one"),
    ],
)
def test_wrong_json_is_named(prompt: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        extract_json_from_prompts([prompt], [""], [""])


def test_scores_are_added_in_order_and_only_where_missing() -> None:
    assert append_score_to_prompts(["cat."], aes=6.5, flow=2, camera_motion="pan right") == [
        "cat. aesthetic score: 6.5. motion score: 2.0. camera motion: pan right."
    ]
    assert append_score_to_prompts([SCORED], aes=4, flow=1, camera_motion="static") == [SCORED]
    assert append_score_to_prompts(["cat."]) == ["cat."]


def test_every_segment_is_scored_and_cleaned() -> None:
    assert prepare_prompt("|0|A Cat!|1|(dog)", aes=6.5) == (
        "|0|a cat! aesthetic score: 6.5.|1|dog aesthetic score: 6.5."
    )
    assert prepare_prompt("A (cat)", clean=False) == "A (cat)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "A Cat, running FAST!! (in the rain) [4k] #123 @nick visit https://foo.com/x",
            "a cat, running fast!! in the rain 4k visit",
        ),
        (
            "A city [aesthetic score: 5.5, motion score: 10.0]",
            "a city aesthetic score: 5.5, motion score: 10.0",
        ),
        (
            "snow_capped-mountains_at-dawn_in-winter 1920x1080 video.mp4",
            "snow capped mountains at dawn in winter",
        ),
        ("“Quoted” text — with dashes… and 中文 123456 ids, page 12", '"quoted" text - with dashes… and ids'),
        ("|weird| \\n {json}", "weird json"),
        (SCORED, SCORED),
        ("", ""),
        ("<b>Bold</b> &amp; <person> <script>x=1</script>", "bold person"),
        ("a < b and b > a", "a < b and b > a"),
        ("see example.org/page now", "see now"),
        ("sent from 10.0.0.1 today", "sent from today"),
        ("jc6640 jc6640vc 6640vc231 stay", "stay"),
        ("free shipping, a boat, click on link", "a boat"),
        ('"quoted whole"', "quoted whole"),
        ("-dangling,", "dangling"),
        ("end.Start and 3.5", "end. start and 3.5"),
        ("wait...what", "wait what"),
        ("ｆｕｌｌ ﬁne", "full fine"),
        ("a%20b+c", "a b c"),
        ("100% cotton", "100% cotton"),
    ],
)
def test_captions_are_cleaned(text: str, expected: str) -> None:
    assert text_preprocessing(text) == expected


def test_cleaning_can_be_left_out() -> None:
    assert text_preprocessing("  A (Cat) ", use_text_preprocessing=False) == "a (cat)"


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n  a dog  \r\na bird", encoding="utf-8")
    assert load_prompts(str(path)) == ["a cat", "a dog", "a bird"]
    assert load_prompts(str(path), 1, 2) == ["a dog"]


def test_prompts_are_read_from_the_captions_of_a_catalogue(tmp_path: Path) -> None:
    texts = ["a cat, sleeping", "two\nlines", "42"]
    table = pyarrow.table({"path": ["a.mp4", "b.mp4", "c.mp4"], "text": texts, "num_frames": [1, 2, 3]})
    csv.write_csv(table, tmp_path / "meta.csv")
    parquet.write_table(table, tmp_path / "meta.parquet")
    assert load_prompts(str(tmp_path / "meta.csv")) == texts
    assert load_prompts(str(tmp_path / "meta.parquet"), 1) == texts[1:]
    csv.write_csv(table.drop_columns("text"), tmp_path / "meta.csv")
    with pytest.raises(DataError, match="text"):
        load_prompts(str(tmp_path / "meta.csv"))


def test_an_unusable_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt does not exist"):
        load_prompts(str(tmp_path / "nothing.txt"))
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_prompts(str(path))
    path.write_text("one\n")
    with pytest.raises(DataError, match="has 1 prompts, none of them from index 3"):
        load_prompts(str(path), 3)
