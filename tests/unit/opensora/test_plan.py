from __future__ import annotations

from collections import Counter
from itertools import pairwise, product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.config.components import STDiT3Config
from opensora.datasets.bucket import Bucket
from opensora.datasets.catalogue import Catalogue
from opensora.datasets.cost import shape_costs
from opensora.datasets.plan import EpochPlan, build_plan, deal
from opensora.errors import ConfigError, DataError

TABLE = {"144p": {1: (1.0, 2), 51: (1.0, 2), 102: (1.0, 1)}}


def catalogue_of(clips: list[tuple[int, int, int]], digest: str = "a") -> Catalogue:
    frames, height, width = np.array(clips, np.int32).reshape(-1, 3).T
    n = len(clips)
    return Catalogue(
        uri="clips.csv", digest=digest, ids=np.arange(n), num_frames=frames, height=height, width=width,
        fps=np.full(n, 24, np.float32), paths=pa.chunked_array([[f"{i}.mp4" for i in range(n)]]),
        texts=pa.chunked_array([[""] * n]), root="/", num_file_rows=n, dropped={}, num_empty_texts=n, num_duplicates=0,
    )  # fmt: skip


def random_catalogue(n: int, seed: int = 0, digest: str = "a") -> Catalogue:
    rng = np.random.default_rng(seed)
    frames, sizes = rng.choice([1, 60, 120, 300], n), rng.choice([144, 256, 512, 720], (n, 2))
    return catalogue_of([(T, H, W) for T, (H, W) in zip(frames.tolist(), sizes.tolist(), strict=True)], digest)


def plan_of(catalogue: Catalogue, table: Any = TABLE, **settings: Any) -> EpochPlan:
    bucket = Bucket(table)
    defaults: dict[str, Any] = {
        "seed": 0, "epoch": 0, "micro_batches_per_step": 2, "balance_window": 4, "drop_last": True, "shuffle": True,
        "frame_interval": 1, "costs": shape_costs(bucket.entries, STDiT3Config()),
    }  # fmt: skip
    return build_plan(catalogue, bucket, **{**defaults, **settings})


def steps(plan: EpochPlan) -> list[list[tuple[str, list[int]]]]:
    return [
        [(micro_batch.shape.name, micro_batch.rows.tolist()) for micro_batch in plan.step(index)]
        for index in range(plan.num_steps)
    ]


def rows_of(plan: EpochPlan) -> list[int]:
    return [row for step in steps(plan) for _, rows in step for row in rows]


def test_rows_are_grouped_as_in_open_sora() -> None:
    frames = [1, 1, 1, 1, 60, 60, 60, 60, 120, 120, 1, 60]
    catalogue = catalogue_of([(T, 512, 512 if i % 2 == 0 else 910) for i, T in enumerate(frames)])
    plan = plan_of(catalogue, shuffle=False)
    assert sorted(batch for step in steps(plan) for batch in step) == [
        ("144p/1/0.56", [1, 3]), ("144p/1/1.00", [0, 2]), ("144p/102/0.56", [9]), ("144p/102/1.00", [8]),
        ("144p/51/0.56", [5, 7]), ("144p/51/1.00", [4, 6]),
    ]  # fmt: skip
    assert (plan.num_left_over, plan.num_unassigned) == (2, 0)
    assert plan.counts()["144p/51/0.56"] == (2, 1)


tables = st.sampled_from(
    [
        TABLE,
        {"144p": {1: (0.5, 3), 51: ((0.8, 0.7), 4)}, "512": {1: (0.5, 2), 102: (0.5, 1), 204: (0.0, None)}},
        {"256": {1: (1.0, 7), 51: (0.3, 3)}, "720p": {51: (0.5, 1)}},
    ]
)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 120), table=tables, seed=st.integers(0, 2**32), epoch=st.integers(0, 50), drop_last=st.booleans(),
    per_step=st.integers(1, 9), balance_window=st.integers(1, 9), shuffle=st.booleans(),
)  # fmt: skip
def test_no_clip_is_lost_or_doubled_in_an_epoch(n: int, table: Any, per_step: int, drop_last: bool, **kw: Any) -> None:
    catalogue = random_catalogue(n, seed=n)
    bucket = Bucket(table)
    assigned = bucket.assign(
        catalogue.num_frames, catalogue.height, catalogue.width, catalogue.ids, seed=kw["seed"], epoch=kw["epoch"]
    )
    wanted = Counter(bucket.entries[index].name for index in assigned if index >= 0)
    try:
        plan = plan_of(catalogue, table, micro_batches_per_step=per_step, drop_last=drop_last, **kw)
    except DataError:
        sizes = {shape.name: shape.batch_size for shape in bucket.entries}
        assert all(drop_last and count < sizes[name] for name, count in wanted.items())
        return
    rows = rows_of(plan)
    assert len(set(rows)) == len(rows) == plan.num_clips
    for index in range(plan.num_steps):
        step = plan.step(index)
        assert len(step) == per_step or index == plan.num_steps - 1
        for micro_batch in step:
            assert all(bucket.entries[assigned[row]] == micro_batch.shape for row in micro_batch.rows)
            assert len(micro_batch.rows) == micro_batch.shape.batch_size or not drop_last
    assert plan.num_unassigned + plan.num_left_over + len(rows) == n
    used = Counter(bucket.entries[assigned[row]].name for row in rows)
    for shape in bucket.entries:
        left = wanted[shape.name] - used[shape.name]
        assert left == (wanted[shape.name] % shape.batch_size if drop_last else 0)


def test_every_small_plan_is_complete() -> None:
    """All catalogues of up to 4 rows of 3 kinds: image, video, and one that no bucket takes."""
    kinds = [(1, 144, 256), (60, 144, 256), (60, 10, 10)]
    for n in range(1, 5):
        for clips in product(kinds, repeat=n):
            takes = sum(clip[1] > 10 for clip in clips)
            if takes:
                plan = plan_of(catalogue_of(list(clips)), drop_last=False)
                assert sorted(rows_of(plan)) == [i for i, clip in enumerate(clips) if clip[1] > 10]
                assert plan.num_unassigned == n - takes


def test_a_plan_depends_on_what_it_is_made_from_and_on_nothing_else() -> None:
    catalogue = random_catalogue(200)
    plan = plan_of(catalogue)
    assert steps(plan_of(random_catalogue(200))) == steps(plan)
    assert plan_of(catalogue).digest == plan.digest
    others = [
        plan_of(catalogue, seed=1), plan_of(catalogue, epoch=1), plan_of(catalogue, micro_batches_per_step=3),
        plan_of(catalogue, balance_window=1), plan_of(catalogue, shuffle=False), plan_of(catalogue, drop_last=False),
        plan_of(catalogue, frame_interval=2), plan_of(catalogue, {"144p": {1: (1.0, 3)}}),
        plan_of(random_catalogue(200, digest="b")),
    ]  # fmt: skip
    assert len({plan.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_plans_are_the_same_on_every_version_and_machine() -> None:
    """Frozen: a run that continues after an upgrade must find the same steps."""
    plan = plan_of(catalogue_of([(1, 192, 192)] * 5 + [(60, 144, 256)] * 4), epoch=3)
    assert steps(plan) == [
        [("144p/51/0.56", [8, 7]), ("144p/51/0.56", [6, 5])],
        [("144p/1/1.00", [2, 4]), ("144p/1/1.00", [3, 0])],
    ]


def test_a_run_that_continues_on_other_ranks_finds_the_rest_of_the_same_steps() -> None:
    catalogue = random_catalogue(300)
    whole = plan_of(catalogue, micro_batches_per_step=8)
    seen = []
    for index in range(whole.num_steps):
        plan = plan_of(catalogue, micro_batches_per_step=8)  # each "restart" builds it anew
        num_ranks = 1 + index % 5
        step = plan.step(index)
        shares = deal([micro_batch.cost for micro_batch in step], num_ranks)
        seen += [step[position].index for share in shares for position in share]
    assert sorted(seen) == list(range(whole.num_micro_batches))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e18), max_size=30), st.integers(1, 12))
def test_ranks_share_a_step_without_loss_and_close_to_evenly(costs: list[float], num_ranks: int) -> None:
    shares = deal(costs, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert len(shares) == num_ranks
    for share in shares:
        assert [costs[index] for index in share] == sorted((costs[index] for index in share), reverse=True)
    loads = [sum(costs[index] for index in share) for share in shares]
    # A greedy schedule exceeds the even share by less than its largest item.
    assert max(loads) <= sum(costs) / num_ranks * (1 + 1e-9) + max(costs, default=0)
    if len(costs) >= num_ranks:
        assert all(shares)


def test_the_costliest_are_dealt_first() -> None:
    assert deal([3, 3, 2, 2, 2], 2) == [[0, 2, 4], [1, 3]]
    assert deal([1, 5, 4, 2], 2) == [[1, 0], [2, 3]]
    assert deal([0, 0, 0], 2) == [[0, 2], [1]]
    assert deal([7], 3) == [[0], [], []]


def idle(plan: EpochPlan) -> float:
    steps = [[micro_batch.cost for micro_batch in plan.step(index)] for index in range(plan.num_steps)]
    return 1 - sum(map(sum, steps)) / sum(plan.micro_batches_per_step * max(step) for step in steps)


def test_steps_of_similar_cost_leave_ranks_little_to_wait_for() -> None:
    catalogue = random_catalogue(4000)
    table = {"144p": {1: (1.0, 30), 51: (1.0, 7), 102: (1.0, 3)}, "512": {1: (0.5, 9), 51: (0.5, 1)}}
    mixed = plan_of(catalogue, table, micro_batches_per_step=8, balance_window=1)
    grouped = plan_of(catalogue, table, micro_batches_per_step=8, balance_window=64)
    assert idle(mixed) > 0.1
    assert idle(grouped) < 0.03


def test_steps_of_an_epoch_come_in_random_order_also_when_grouped() -> None:
    plan = plan_of(random_catalogue(2000), micro_batches_per_step=4, balance_window=10**6)
    costs = np.array([sum(micro_batch.cost for micro_batch in plan.step(index)) for index in range(plan.num_steps - 1)])
    rising = (np.diff(costs) > 0).mean()
    falling = (np.diff(costs) < 0).mean()
    assert rising == pytest.approx(falling, abs=0.1)
    assert rising > 0.15


@pytest.mark.parametrize("window", [50, 94])
def test_no_window_is_smaller_than_asked_for(window: int) -> None:
    """A window of 94 of 95 steps would leave one step on its own, badly balanced."""
    plan = plan_of(random_catalogue(65 * 4), {"144p": {51: (1.0, 1)}, "512": {51: (0.5, 1)}}, balance_window=window)
    costs = [[micro_batch.cost for micro_batch in plan.step(index)] for index in range(plan.num_steps)]
    assert window < plan.num_steps < 2 * window
    spans = sorted((min(step), max(step)) for step in costs)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))


def test_which_clips_are_left_over_changes_with_the_epoch() -> None:
    catalogue = catalogue_of([(60, 144, 256)] * 9)
    left = [set(range(9)) - set(rows_of(plan_of(catalogue, epoch=epoch))) for epoch in range(12)]
    assert all(len(rows) == 1 for rows in left)
    assert len(set().union(*left)) > 3


def test_without_shuffling_clips_come_in_the_order_of_the_catalogue() -> None:
    plan = plan_of(catalogue_of([(60, 144, 256)] * 8), shuffle=False)
    assert rows_of(plan) == list(range(8))


def test_a_clip_must_be_as_many_times_as_long_as_frames_are_skipped() -> None:
    catalogue = catalogue_of([(60, 144, 256)] * 4 + [(120, 144, 256)] * 4)
    plan = plan_of(catalogue, {"144p": {51: (1.0, 2)}}, frame_interval=2)
    assert sorted(rows_of(plan)) == [4, 5, 6, 7]
    assert plan.num_unassigned == 4


def test_an_epoch_without_a_full_batch_says_which_buckets_lack_rows() -> None:
    catalogue = catalogue_of([(60, 144, 256)] * 3 + [(60, 192, 192)])
    with pytest.raises(DataError) as error:
        plan_of(catalogue, {"144p": {51: (1.0, 5)}})
    assert "144p/51/0.56: 3 rows, batch size 5, 144p/51/1.00: 1 rows, batch size 5" in error.value.message
    assert "clips.csv" in error.value.message
    assert "drop_last=false" in (error.value.hint or "")
    assert plan_of(catalogue, {"144p": {51: (1.0, 5)}}, drop_last=False).num_clips == 4


def test_a_bucket_table_that_matches_nothing_says_what_the_clips_are() -> None:
    catalogue = catalogue_of([(40, 100, 100), (60, 90, 120)])
    with pytest.raises(DataError, match=r"no bucket takes any of the 2 rows.*40 to 60 frames.*240p/51, 240p/1"):
        plan_of(catalogue, {"240p": {51: (1.0, 5), 1: (1.0, 2)}})


def test_nonsense_arguments_are_refused() -> None:
    catalogue = random_catalogue(5)
    with pytest.raises(ConfigError, match="micro_batches_per_step=0"):
        plan_of(catalogue, micro_batches_per_step=0)
    with pytest.raises(ConfigError, match="balance_window=0"):
        plan_of(catalogue, balance_window=0)
    with pytest.raises(ConfigError, match="2 costs for 51 bucket shapes"):
        plan_of(catalogue, costs=np.ones(2))
    with pytest.raises(ConfigError, match="not a number"):
        plan_of(catalogue, costs=np.full(51, np.nan))


def test_there_is_no_step_beyond_the_last() -> None:
    plan = plan_of(random_catalogue(30))
    for index in (-1, plan.num_steps):
        with pytest.raises(IndexError, match=f"step {index} of an epoch with {plan.num_steps} steps"):
            plan.step(index)
