from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.datasets.aspect import ASPECT_RATIOS, get_closest_ratio
from opensora.datasets.bucket import Bucket, BucketId
from opensora.errors import ConfigError

GOLDEN = {
    "144p": {1: (1.0, 4), 51: (0.5, 2), 102: ((1.0, 0.4), 1)},
    "240p": {1: (0.3, 2), 51: (0.4, 1)},
    "512": {1: (0.5, 2)},
}
CLIPS = [
    (1, 512, 512),
    (1, 1080, 1920),
    (60, 240, 426),
    (200, 720, 1280),
    (52, 144, 256),
    (51, 144, 256),
    (1, 100, 100),
]


def published_rule(
    table: dict[str, Any], num_frames: int, height: int, width: int, frame_interval: int, seed: int
) -> BucketId | None:
    """Open-Sora's rule, written down step by step as in its description."""
    levels = sorted(table, key=lambda name: ASPECT_RATIOS[name][0], reverse=True)
    keys = [(name, frames) for name in levels for frames in sorted(table[name], reverse=True)]
    for name in levels:
        if height * width < 0.8 * ASPECT_RATIOS[name][0]:
            continue
        chosen = None
        p: Any = None
        rng = None
        if num_frames == 1:
            if 1 not in table[name]:
                continue
            if np.random.default_rng(seed + keys.index((name, 1))).random() < table[name][1][0]:
                return name, 1, get_closest_ratio(height, width, ASPECT_RATIOS[name][1])
        for frames in sorted(table[name], reverse=True):
            rng = np.random.default_rng(seed + keys.index((name, frames)))
            p = table[name][frames][0]
            if isinstance(p, tuple) and rng.random() > p[1]:
                continue
            if num_frames > frames * frame_interval and frames != 1:
                chosen = frames
                break
        if chosen is None:
            continue
        assert rng is not None
        p = p[0] if isinstance(p, tuple) else p
        if p >= 1 or rng.random() < p:
            return name, chosen, get_closest_ratio(height, width, ASPECT_RATIOS[name][1])
    return None


def assigned(bucket: Bucket, clips: list[tuple[int, int, int]], ids: Any, **kw: Any) -> list[BucketId | None]:
    frames, height, width = np.array(clips, np.int32).reshape(-1, 3).T
    found = bucket.assign(frames, height, width, np.array(ids, np.int64), **kw)
    shapes = [bucket.entries[index] if index >= 0 else None for index in found]
    return [None if shape is None else (shape.resolution, shape.num_frames, shape.ratio) for shape in shapes]


def test_buckets_are_numbered_from_the_largest_and_longest() -> None:
    bucket = Bucket(GOLDEN)
    assert len(bucket) == 125
    numbers = {(shape.resolution, shape.num_frames): shape.key_index for shape in bucket.entries}
    assert numbers == {
        ("512", 1): 0, ("240p", 51): 1, ("240p", 1): 2, ("144p", 102): 3, ("144p", 51): 4, ("144p", 1): 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seed", "first", "second", "third", "fourth"),
    [
        (0, ("240p", 1, "1.00"), ("240p", 1, "0.56"), None, ("144p", 102, "0.56")),
        (1, ("240p", 1, "1.00"), ("240p", 1, "0.56"), ("240p", 51, "0.56"), ("240p", 51, "0.56")),
        (2, ("512", 1, "1.0"), ("512", 1, "0.57"), ("240p", 51, "0.56"), ("240p", 51, "0.56")),
        (3, ("512", 1, "1.0"), ("512", 1, "0.57"), None, None),
    ],
)
def test_a_clip_gets_the_bucket_that_open_sora_gave_it(
    seed: int, first: BucketId, second: BucketId, third: BucketId | None, fourth: BucketId | None
) -> None:
    expected = [first, second, third, fourth, None, None, None]
    bucket = Bucket(GOLDEN)
    assert [bucket.get_bucket_id(*clip, seed=seed) for clip in CLIPS] == expected
    assert assigned(bucket, CLIPS, [0] * len(CLIPS), seed=seed, epoch=0) == expected


def test_a_clip_must_be_longer_than_its_bucket_and_have_most_of_its_pixels() -> None:
    bucket = Bucket({"144p": {51: (1.0, 1)}})
    assert bucket.get_bucket_id(51, 144, 256, seed=0) is None
    assert bucket.get_bucket_id(52, 144, 256, seed=0) == ("144p", 51, "0.56")
    assert bucket.get_bucket_id(153, 144, 256, 3, seed=0) is None
    assert bucket.get_bucket_id(154, 144, 256, 3, seed=0) == ("144p", 51, "0.56")
    # 0.8 x 36864 = 29491.2
    assert bucket.get_bucket_id(52, 1, 29491, seed=0) is None
    assert bucket.get_bucket_id(52, 1, 29492, seed=0) == ("144p", 51, "0.38")


def test_a_gate_sends_long_clips_to_a_smaller_resolution() -> None:
    bucket = Bucket({"144p": {51: (1.0, 1)}, "240p": {51: (1.0, 1), 102: (0.0, None)}})
    assert bucket.get_bucket_id(60, 720, 1280, seed=0) == ("240p", 51, "0.56")
    assert bucket.get_bucket_id(120, 720, 1280, seed=0) == ("144p", 51, "0.56")
    assert len(bucket) == 3 * 17
    assert {shape.num_frames for shape in bucket.entries if shape.resolution == "240p"} == {51}
    assert bucket.get_batch_size(("240p", 102)) is None


probabilities = st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0])
entries = st.tuples(probabilities | st.tuples(probabilities, probabilities), st.integers(1, 9))
levels = st.dictionaries(st.sampled_from([17, 51, 102]), entries, max_size=3).flatmap(
    lambda videos: (
        st.tuples(probabilities, st.just(2)).map(lambda image: {1: image, **videos})
        | (st.just(videos) if videos else st.nothing())
    )
)
tables = st.dictionaries(st.sampled_from(["144p", "256", "240p", "512", "2880", "4k"]), levels, min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(0, 2**32), st.integers(0, 10**7), st.integers(1, 3), st.randoms(use_true_random=False))
def test_all_ways_to_assign_agree(table: dict[str, Any], seed: int, first: int, interval: int, random: Any) -> None:
    bucket = Bucket(table)
    sizes = [144, 200, 256, 426, 512, 720, 1440, 3840]
    clips = [
        (random.choice([1, 2, 17, 18, 51, 52, 103, 310]), random.choice(sizes), random.choice(sizes)) for _ in range(60)
    ]
    ids = [first + 7 * i for i in range(len(clips))]
    seeds = [seed + 5 + i * len(bucket) for i in ids]
    scalar = [bucket.get_bucket_id(*clip, interval, seed=seed) for clip, seed in zip(clips, seeds, strict=True)]
    published = [published_rule(table, *clip, interval, seed) for clip, seed in zip(clips, seeds, strict=True)]
    assert scalar == published
    assert assigned(bucket, clips, ids, seed=seed, epoch=5, frame_interval=interval) == scalar


def test_nothing_is_assigned_where_there_are_no_rows() -> None:
    empty = np.array([], np.int64)
    assert len(Bucket(GOLDEN).assign(empty, empty, empty, empty, seed=0, epoch=0)) == 0


def test_assignment_changes_with_the_epoch_and_keeps_the_shares() -> None:
    bucket = Bucket({"144p": {51: (0.3, 1)}})
    n = 20000
    columns = [np.full(n, value, np.int32) for value in (60, 144, 256)]
    taken = [bucket.assign(*columns, np.arange(n), seed=1, epoch=epoch) >= 0 for epoch in range(2)]
    for epoch in taken:
        assert epoch.mean() == pytest.approx(0.3, abs=0.015)
    # Kept in both: 0.3 x 0.3 if the epochs are independent.
    assert (taken[0] & taken[1]).mean() == pytest.approx(0.09, abs=0.01)


def test_what_a_bucket_says_about_an_id() -> None:
    bucket = Bucket(GOLDEN)
    assert bucket.get_thw(("144p", 102, "0.56")) == (102, 144, 256)
    assert bucket.get_prob(("144p", 102, "0.56")) == (1.0, 0.4)
    assert bucket.get_batch_size(("144p", 1, "0.56")) == 4
    shape = next(shape for shape in bucket.entries if shape.name == "144p/51/0.56")
    assert (shape.num_frames, shape.height, shape.width, shape.batch_size) == (51, 144, 256, 2)


def test_lists_from_yaml_are_tuples() -> None:
    assert Bucket({"144p": {51: [[0.5, 0.25], 2]}}).get_prob(("144p", 51)) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "no entry"),
        ({"144p": {51: (0.0, None)}}, "no entry"),
        ({"145p": {51: (1.0, 1)}}, "'145p'.*\n.*144p"),
        ({"144p": {}}, "'144p'"),
        ({"144p": [51, 1.0, 2]}, "'144p'"),
        ({"144p": {0: (1.0, 1)}}, "0 is not a number of frames"),
        ({"144p": {"51": (1.0, 1)}}, "'51' is not a number of frames"),
        ({"144p": {51: 1.0}}, "not a pair"),
        ({"144p": {51: (1.0, 1, 1)}}, "not a pair"),
        ({"144p": {51: (475, 0)}}, "475 is not a probability"),
        ({"144p": {51: (-0.1, 1)}}, "-0.1 is not a probability"),
        ({"144p": {51: (float("nan"), 1)}}, "nan is not a probability"),
        ({"144p": {51: (None, 100)}}, "None is not a probability"),
        ({"144p": {51: ((1.0, 0.5, 0.5), 1)}}, "is not a probability"),
        ({"144p": {1: ((1.0, 0.5), 1)}}, "images have one probability"),
        ({"144p": {51: (0.5, None)}}, "no batch size"),
        ({"144p": {51: (1.0, 0)}}, "0 is not a batch size"),
        ({"144p": {51: (1.0, 1.5)}}, "1.5 is not a batch size"),
        ({"144p": {51: (1.0, True)}}, "True is not a batch size"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_by_entry(table: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Bucket(table)


def test_seeds_that_are_missing_or_out_of_range_are_refused() -> None:
    bucket = Bucket(GOLDEN)
    with pytest.raises(ConfigError, match="needs a seed"):
        bucket.get_bucket_id(60, 144, 256)
    one = np.ones(1, np.int64)
    for seed in (-1, 2**63):
        with pytest.raises(ConfigError, match=str(seed)):
            bucket.assign(one, one, one, one, seed=seed, epoch=0)
