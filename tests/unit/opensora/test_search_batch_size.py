"""The batch-size search on made-up machines: what it measures, what it concludes, and what its table is good for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from opensora.batch_search.choice import (
    MAX_MEASUREMENTS,
    Limits,
    Measure,
    NothingFits,
    choose,
    common_step_seconds,
)
from opensora.batch_search.fresh_process import Failure, Outcome, OutOfMemory, outcome_of
from opensora.batch_search.probe import ProbeResult, largest_shape
from opensora.batch_search.report import SearchReport, format_known, parse_known
from opensora.batch_search.search import BatchSearch, MeasurementFailedError
from opensora.config.flags import parse_search_command
from opensora.config.load import config_from_mapping, load_search_config
from opensora.config.search import SearchConfig, parse_bytes
from opensora.config.train import StorageConfig, TrainConfig
from opensora.datasets.aspect import ASPECT_RATIOS
from opensora.datasets.batch_table import (
    BatchTable,
    BucketResult,
    Evidence,
    Point,
    check_facts,
    facts_of,
    read_batch_table,
    with_batch_sizes,
)
from opensora.errors import (
    ConfigError,
    DataError,
    ExitCode,
    OutOfMemoryError,
    StopRequestedError,
    UsageError,
)
from opensora.records import EndRecord, Verdict

GIB = 2**30
Memory = Callable[[int], float]


def settle(
    memory: Memory,
    limit: float,
    *,
    max_batch: int = 1024,
    dies_above: float = math.inf,
    seconds: Callable[[int], float] = float,
    step_seconds: float = math.inf,
) -> tuple[BucketResult | NothingFits, list[int]]:
    """Follow `choose` on a machine whose memory is a function of the batch; also what was measured, in order."""
    evidence = Evidence()
    measured: list[int] = []
    while isinstance(choice := choose(evidence, Limits(limit, step_seconds), max_batch=max_batch), Measure):
        size = choice.batch_size
        assert size not in measured, f"{size} is measured twice: {measured}"
        measured.append(size)
        if memory(size) > dies_above:
            evidence = replace(evidence, too_large=(*evidence.too_large, size))
        else:
            evidence = replace(evidence, points=(*evidence.points, Point(size, int(memory(size)), seconds(size))))
    return choice, measured


def largest_that_fits(memory: Memory, limit: float) -> int:
    """By trying them all: the last size before the first that does not fit."""
    return next(size for size in range(1, 3000) if memory(size) > limit) - 1


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("constant", "per_clip"), [(5, 3), (0, 0.7), (40, 11), (20, 0.25), (1, 64)])
@pytest.mark.parametrize("dies_above", [math.inf, 140 * GIB], ids=["measured", "killed"])
def test_linear_memory_is_found_exactly_with_four_processes(
    constant: float, per_clip: float, dies_above: float
) -> None:
    def memory(size: int) -> float:
        return (constant + per_clip * size) * GIB

    found, measured = settle(memory, 130 * GIB, dies_above=dies_above)
    assert isinstance(found, BucketResult)
    assert found.batch_size == math.floor((130 - constant) / per_clip)
    assert found.batch_size in measured
    assert found.peak_bytes == int(memory(found.batch_size))
    assert len(measured) <= (5 if found.batch_size > 128 else 4)


def test_the_line_is_told() -> None:
    found, _ = settle(lambda size: 100.0 + 30 * size, 1000)
    assert isinstance(found, BucketResult)
    assert found.fit is not None
    assert found.fit.bytes_per_clip == pytest.approx(30)
    assert found.fit.constant_bytes == pytest.approx(100)


SHAPES: dict[str, tuple[Memory, float]] = {
    "flat, then linear": (lambda n: max(5.0, 0.1 * n), 30),
    "faster than linear": (lambda n: float(n * n), 110),
    "slower than linear": (lambda n: 4 * math.sqrt(n), 30),
    "in steps": (lambda n: 2.0 * math.ceil(n * 1.3), 77),
    "in large steps": (lambda n: 16.0 * math.ceil(n / 8), 100),
}


@pytest.mark.parametrize("dies_above", [1.0, 1.1, math.inf], ids=["killed", "killed a little later", "measured"])
@pytest.mark.parametrize("name", SHAPES)
def test_memory_that_is_not_linear_is_bracketed(name: str, dies_above: float) -> None:
    shape, limit = SHAPES[name]

    def memory(size: int) -> float:
        return shape(size) * GIB

    limit *= GIB
    found, measured = settle(memory, limit, dies_above=dies_above * limit)
    truth = largest_that_fits(memory, limit)
    assert isinstance(found, BucketResult)
    assert memory(found.batch_size) <= limit
    assert found.batch_size in measured
    assert found.batch_size >= 0.9 * truth
    assert len(measured) <= MAX_MEASUREMENTS


def test_a_chord_that_says_too_little_is_not_the_last_word() -> None:
    found, _ = settle(lambda n: float(n * n), 100)
    assert isinstance(found, BucketResult)
    assert found.batch_size == 10


def test_nothing_above_a_size_that_does_not_fit_is_taken() -> None:
    """A kernel that is chosen at sizes from 5 on takes a workspace, and one from 8 on none."""
    found, _ = settle(lambda n: n + (50 if 5 <= n < 8 else 0), 40)
    assert isinstance(found, BucketResult)
    assert found.batch_size in (4, 40)
    evidence = Evidence((Point(1, 1, 1.0), Point(5, 55, 1.0), Point(40, 40, 1.0)))
    then = choose(evidence, Limits(41), max_batch=1024)
    assert then in (Measure(2), Measure(3), Measure(4))


def test_noise_costs_little_and_never_breaks_the_limit() -> None:
    generator = random.Random(7)
    sizes, shares = [], []
    for _ in range(300):
        constant, per_clip = generator.uniform(0, 20), 10 ** generator.uniform(-2, 1)
        noise = generator.uniform(0, 0.02)
        cache: dict[int, float] = {}

        def memory(
            n: int, a: float = constant, b: float = per_clip, s: float = noise, c: dict[int, float] = cache
        ) -> float:
            return c.setdefault(n, (a + b * n) * generator.uniform(1 - s, 1 + s) * GIB)

        found, measured = settle(memory, 64 * GIB, dies_above=generator.choice([math.inf, 66 * GIB]))
        assert isinstance(found, BucketResult)
        assert memory(found.batch_size) <= 64 * GIB
        shares.append(found.batch_size / max(1, min(1024, math.floor((64 - constant) / per_clip))))
        sizes.append(len(measured))
    assert sum(sizes) / len(sizes) < 6
    assert sum(shares) / len(shares) > 0.97
    assert min(shares) > 0.8


@pytest.mark.parametrize("dies_above", [math.inf, 10], ids=["measured", "killed"])
def test_a_single_clip_that_does_not_fit_is_told_with_numbers(dies_above: float) -> None:
    found, measured = settle(lambda n: 50.0 * GIB * n, 7 * GIB, dies_above=dies_above * GIB)
    assert measured == [1]
    assert isinstance(found, NothingFits)
    assert "7 GiB" in found.reason
    assert ("50 GiB" in found.reason) == (dies_above == math.inf)


def test_the_largest_size_that_was_asked_for_ends_the_search() -> None:
    found, measured = settle(lambda n: float(n), 1e9, max_batch=100)
    assert isinstance(found, BucketResult)
    assert (found.batch_size, max(measured)) == (100, 100)


def test_one_as_the_largest_size_needs_one_measurement() -> None:
    found, measured = settle(lambda n: float(n), 1e9, max_batch=1)
    assert measured == [1]
    assert isinstance(found, BucketResult)
    assert found.fit is None


def test_sizes_are_not_raised_by_more_than_eightfold_at_once() -> None:
    _, measured = settle(lambda n: max(100.0, float(n)), 900)
    assert all(size <= 8 * max(measured[:place], default=1) for place, size in enumerate(measured))


def test_step_time_limits_the_batch_as_memory_does() -> None:
    found, _ = settle(lambda n: float(n), 100, seconds=lambda n: 0.2 + 0.1 * n, step_seconds=2.0)
    assert isinstance(found, BucketResult)
    assert found.batch_size == 18
    found, _ = settle(lambda n: float(n), 10, seconds=lambda n: 0.2 + 0.1 * n, step_seconds=2.0)
    assert isinstance(found, BucketResult)
    assert found.batch_size == 10


def test_one_clip_may_take_longer_than_a_step() -> None:
    found, measured = settle(lambda n: float(n), 100, seconds=lambda n: 5.0 * n, step_seconds=2.0)
    assert isinstance(found, BucketResult)
    assert (found.batch_size, measured) == (1, [1])


def result(batch_size: int, seconds: float, single: float) -> BucketResult:
    points = (Point(1, 1, single), Point(batch_size, 1, seconds))
    return BucketResult(
        batch_size=batch_size, peak_bytes=1, seconds_per_step=seconds, fit=None, evidence=Evidence(points)
    )


def test_the_common_step_is_what_all_buckets_can_do() -> None:
    small, large = result(40, 2.0, 0.1), result(4, 3.0, 0.8)
    assert common_step_seconds({"small": small, "large": large}) == 2.0
    slow = result(1, 6.0, 6.0)
    assert common_step_seconds({"small": small, "large": large, "slow": slow}) == 6.0


# --------------------------------------------------------------------------------------------------------- the search


CONFIG = {
    "run_uri": "run",
    "device": "cpu",
    "model": {"type": "STDiT3", "hidden_size": 32, "depth": 1, "num_heads": 2},
    "data": {
        "path": "m.csv",
        "bucket_config": {"144p": {1: [1.0, 1], 17: [1.0, 1], 34: [0.0, None]}, "64px": {17: [1.0, 1]}},
    },
    "train": {"steps": 10},
}
EMPTY_BYTES = 400 * 2**20
PER_CLIP = {"144p/17": 30 * 2**20, "144p/1": 3 * 2**20, "64px/17": 2**20}


def training(**changes: object) -> TrainConfig:
    return config_from_mapping(TrainConfig, {**CONFIG, **changes}, "test")


class Machine:
    """A CPU on which a clip takes the same memory and time in every batch."""

    def __init__(self, *, dies_above: float = math.inf) -> None:
        self.measured: list[tuple[str, int]] = []
        self.dies_above = dies_above
        self.broken: dict[str, Failure] = {}
        self.stop_at: tuple[str, int] | None = None

    def __call__(self, bucket: str, batch_size: int) -> Outcome:
        self.measured.append((bucket, batch_size))
        if (bucket, batch_size) == self.stop_at:
            raise StopRequestedError("stop")
        if batch_size and bucket in self.broken:
            return self.broken[bucket]
        taken = PER_CLIP[bucket] * batch_size
        if taken > self.dies_above:
            return OutOfMemory("killed by SIGKILL")
        return ProbeResult(
            peak_bytes=EMPTY_BYTES + taken,
            seconds_per_step=0.1 + taken / 2**30,
            accelerator="cpu",
            device_bytes=None,
            ranks=1,
            versions={"torch": "2"},
        )

    @property
    def clips_measured(self) -> list[tuple[str, int]]:
        return [(bucket, size) for bucket, size in self.measured if size]


@pytest.fixture
def machine() -> Machine:
    return Machine()


def search(machine: Machine, output: Path, config: TrainConfig | None = None, **settings: object) -> BatchTable:
    given = config_from_mapping(
        SearchConfig, {"memory_budget": "1GiB", "output": str(output / "table.json"), **settings}, "test"
    )
    return BatchSearch(config or training(), given, measure=machine, tell=lambda *_: None).run()


def sizes(table: BatchTable) -> dict[str, int]:
    return {name: found.batch_size for name, found in table.buckets.items()}


def test_every_bucket_that_takes_clips_gets_what_fits_beside_the_headroom(machine: Machine, tmp_path: Path) -> None:
    table = search(machine, tmp_path, headroom_percent=10)
    budget = 0.9 * 2**30
    assert sizes(table) == {name: math.floor(budget / per_clip) for name, per_clip in PER_CLIP.items()}
    assert table.empty_bytes == EMPTY_BYTES
    assert all(found.peak_bytes <= budget for found in table.buckets.values())
    assert read_batch_table(str(tmp_path / "table.json"), storage=StorageConfig()) == table


def test_headroom_is_eight_percent_unless_given(machine: Machine, tmp_path: Path) -> None:
    assert sizes(search(machine, tmp_path))["144p/17"] == math.floor(0.92 * 1024 / 30)


def test_running_out_of_memory_is_an_answer(tmp_path: Path) -> None:
    table = search(Machine(dies_above=2**30), tmp_path, bucket=["144p/17"])
    assert sizes(table) == {"144p/17": 31}
    assert not table.failed


def test_any_other_failure_ends_its_bucket_alone(machine: Machine, tmp_path: Path) -> None:
    machine.broken["144p/17"] = Failure(ExitCode.DIVERGED, "the loss is not finite")
    table = search(machine, tmp_path)
    assert table.failed["144p/17"].reason == "the loss is not finite"
    assert table.failed["144p/17"].code == ExitCode.DIVERGED
    assert set(table.buckets) == {"144p/1", "64px/17"}
    assert [size for bucket, size in machine.clips_measured if bucket == "144p/17"] == [1]


def test_a_bucket_of_which_one_clip_does_not_fit_has_a_reason(machine: Machine, tmp_path: Path) -> None:
    table = search(machine, tmp_path, memory_budget="20MiB")
    assert "one clip takes 0.0293 GiB" in table.failed["144p/17"].reason
    assert table.failed["144p/17"].code == ExitCode.OUT_OF_MEMORY
    assert sizes(table) == {"144p/1": 6, "64px/17": 18}


def test_finished_buckets_are_not_measured_again(machine: Machine, tmp_path: Path) -> None:
    first = search(machine, tmp_path)
    again = Machine()
    assert search(again, tmp_path) == first
    assert again.clips_measured == []


def test_a_search_that_was_stopped_goes_on_in_the_middle_of_a_bucket(tmp_path: Path, machine: Machine) -> None:
    whole = Machine()
    expected = search(whole, tmp_path / "whole")
    machine.stop_at = whole.clips_measured[6]
    with pytest.raises(StopRequestedError):
        search(machine, tmp_path)
    kept = read_batch_table(str(tmp_path / "table.json"), storage=StorageConfig())
    assert kept is not None
    assert set(kept.buckets) < set(expected.buckets)
    rest = Machine()
    assert search(rest, tmp_path) == expected
    assert rest.clips_measured == whole.clips_measured[6:]


def test_a_failed_bucket_is_tried_again_with_what_is_known(machine: Machine, tmp_path: Path) -> None:
    search(machine, tmp_path, bucket=["64px/17"])
    machine.broken["144p/17"] = Failure(1, "no space left on device")
    search(machine, tmp_path)
    again = Machine()
    table = search(again, tmp_path)
    assert not table.failed
    assert {bucket for bucket, _ in again.clips_measured} == {"144p/17"}


def test_other_headroom_measures_only_what_it_needs(machine: Machine, tmp_path: Path) -> None:
    search(machine, tmp_path, bucket=["144p/17"])
    again = Machine()
    table = search(again, tmp_path, bucket=["144p/17"], headroom_percent=50)
    assert sizes(table) == {"144p/17": 17}
    assert len(again.clips_measured) == 1


@pytest.mark.parametrize(
    ("changes", "settings", "named"),
    [
        ({"dtype": "fp32"}, {}, "dtype"),
        ({"model": {"type": "STDiT3", "hidden_size": 64, "depth": 1, "num_heads": 2}}, {}, "model"),
        ({"parallel": {"activation_checkpointing": "full"}}, {}, "activation_checkpointing"),
        ({}, {"memory_budget": "2GiB"}, "memory_bytes"),
    ],
)
def test_a_table_of_another_search_is_left_alone(
    changes: dict[str, object], settings: dict[str, object], named: str, machine: Machine, tmp_path: Path
) -> None:
    search(machine, tmp_path)
    before = (tmp_path / "table.json").read_bytes()
    with pytest.raises(ConfigError, match=f"another {named}"):
        search(machine, tmp_path, training(**changes), **settings)
    assert (tmp_path / "table.json").read_bytes() == before


def test_keys_differ_exactly_where_facts_do(machine: Machine, tmp_path: Path) -> None:
    key = search(machine, tmp_path / "1").key
    assert search(Machine(), tmp_path / "2", training(run_uri="elsewhere")).key == key
    assert search(Machine(), tmp_path / "3", training(dtype="fp32")).key != key


def test_steps_of_all_buckets_can_be_made_alike(machine: Machine, tmp_path: Path) -> None:
    table = search(machine, tmp_path, objective="EqualStepTime", max_batch=200)
    alike = table.step_seconds or 0.0
    assert alike == pytest.approx(0.1 + 200 / 1024)  # 200 clips of the smallest bucket
    for name, found in table.buckets.items():
        assert found.seconds_per_step <= alike
        assert 0.1 + (found.batch_size + 1) * PER_CLIP[name] / 2**30 > alike or found.batch_size == 200


def test_a_stopped_search_for_alike_steps_has_no_results_yet(tmp_path: Path) -> None:
    whole = Machine()
    search(whole, tmp_path / "whole", objective="EqualStepTime")
    machine = Machine()
    machine.stop_at = ("64px/17", 1)
    with pytest.raises(StopRequestedError):
        search(machine, tmp_path, objective="EqualStepTime")
    kept = read_batch_table(str(tmp_path / "table.json"), storage=StorageConfig())
    assert kept is not None
    assert kept.buckets == {}


def test_what_is_known_from_elsewhere_is_not_measured(machine: Machine, tmp_path: Path) -> None:
    known = [f"1:{PER_CLIP['144p/17']}:0.13", f"2:{2 * PER_CLIP['144p/17']}:0.16", "32:oom"]
    table = search(machine, tmp_path, bucket=["144p/17"], known=known)
    assert sizes(table) == {"144p/17": 31}
    assert machine.clips_measured[0] == ("144p/17", 16)


def test_a_model_that_does_not_fit_is_told_before_any_clip(tmp_path: Path) -> None:
    class Full(Machine):
        def __call__(self, bucket: str, batch_size: int) -> Outcome:
            return OutOfMemory("killed")

    with pytest.raises(OutOfMemoryError, match="even without a clip"):
        search(Full(), tmp_path)


def test_a_training_that_does_not_run_keeps_its_code(tmp_path: Path) -> None:
    class Broken(Machine):
        def __call__(self, bucket: str, batch_size: int) -> Outcome:
            return Failure(ExitCode.CONFIG, "no such model")

    with pytest.raises(MeasurementFailedError, match="no such model") as caught:
        search(Broken(), tmp_path)
    assert caught.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"bucket": ["240p/51"]}, UsageError, "144p/17"),
        ({"bucket": ["144p/34"]}, UsageError, "takes clips"),
        ({"memory_budget": None}, ConfigError, "memory_budget"),
        ({"memory_budget": "much"}, ConfigError, "2GiB"),
        ({"known": ["1:2:3"]}, ConfigError, "exactly one bucket"),
        ({"known": ["1:2"], "bucket": ["144p/1"]}, UsageError, "8:oom"),
        ({"step_seconds": 1.0}, ConfigError, "EqualStepTime"),
        ({"headroom_percent": 100.0}, ConfigError, "headroom_percent"),
        ({"max_batch": 0}, ConfigError, "max_batch"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    settings: dict[str, object], kind: type[Exception], words: str, machine: Machine, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        search(machine, tmp_path, **settings)
    assert words in str(caught.value)
    assert machine.measured == []


def test_a_gpu_knows_its_memory(tmp_path: Path) -> None:
    class Gpu(Machine):
        def __call__(self, bucket: str, batch_size: int) -> Outcome:
            found = super().__call__(bucket, batch_size)
            assert isinstance(found, ProbeResult)
            return replace(found, accelerator="NVIDIA H200", device_bytes=2 * 2**30)

    table = search(Gpu(), tmp_path, training(device="auto"), memory_budget=None, headroom_percent=0)
    assert sizes(table)["144p/17"] == math.floor((2048 - 400) / 30)
    assert table.empty_bytes == 0
    assert table.facts["accelerator"] == "NVIDIA H200"


# ----------------------------------------------------------------------------------------------------------- outcomes


def leave(folder: Path, code: int, message: str = "") -> None:
    first = None if code == 0 else EndRecord(rank=0, time=0, code=code, reason="x", message=message, last_words=["w"])
    verdict = Verdict(code=code, message=message, time=0, first=first)
    (folder / "verdict.json").write_text(verdict.to_json())


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ExitCode.OUT_OF_MEMORY, OutOfMemory),
        (ExitCode.FAILED, Failure),
        (ExitCode.DIVERGED, Failure),
        (ExitCode.PEER_LOST, Failure),
        (ExitCode.CONFIG, Failure),
        (ExitCode.STALLED, Failure),
    ],
)
def test_only_running_out_of_memory_means_that_a_batch_does_not_fit(code: ExitCode, kind: type, tmp_path: Path) -> None:
    leave(tmp_path, code, "what happened")
    outcome = outcome_of(tmp_path, int(code), oom_killed=False)
    assert type(outcome) is kind
    assert outcome == (OutOfMemory("what happened") if kind is OutOfMemory else Failure(code, "what happened"))


def test_a_measurement_gives_its_numbers(tmp_path: Path) -> None:
    leave(tmp_path, 0)
    found = Machine()("144p/1", 2)
    assert isinstance(found, ProbeResult)
    (tmp_path / "result.json").write_text(json.dumps(found.__dict__))
    assert outcome_of(tmp_path, 0, oom_killed=False) == found


def test_a_killed_launcher_counts_as_memory_only_if_the_kernel_says_so(tmp_path: Path) -> None:
    (tmp_path / "output.txt").write_text("one\nlast line\n")
    assert isinstance(outcome_of(tmp_path, -9, oom_killed=True), OutOfMemory)
    outcome = outcome_of(tmp_path, -9, oom_killed=False)
    assert isinstance(outcome, Failure)
    assert "last line" in outcome.message


def test_a_measurement_that_takes_too_long_is_no_answer(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path, None, oom_killed=False)
    assert isinstance(outcome, Failure)
    assert "probe_timeout_seconds" in outcome.message


def test_a_stop_is_no_failure(tmp_path: Path) -> None:
    leave(tmp_path, ExitCode.STOPPED)
    with pytest.raises(StopRequestedError):
        outcome_of(tmp_path, ExitCode.STOPPED, oom_killed=False)


# -------------------------------------------------------------------------------------------------- using the table


def test_a_table_replaces_the_batch_sizes_and_nothing_else(machine: Machine, tmp_path: Path) -> None:
    table = search(machine, tmp_path, headroom_percent=0)
    buckets = with_batch_sizes(training().data.bucket_config, table, uri="t")
    assert buckets == {
        "144p": {1: (1.0, 341), 17: (1.0, 34), 34: (0.0, None)},
        "64px": {17: (1.0, 1024)},
    }


def test_buckets_without_an_entry_are_named_with_the_reason(machine: Machine, tmp_path: Path) -> None:
    machine.broken["64px/17"] = Failure(1, "no disk")
    table = search(machine, tmp_path, bucket=["144p/17", "64px/17"])
    with pytest.raises(ConfigError) as caught:
        with_batch_sizes(training().data.bucket_config, table, uri="s3://b/t.json")
    assert "144p/1, 64px/17 (no disk)" in str(caught.value)
    assert "144p/17" not in str(caught.value)
    assert "--bucket 144p/1 64px/17 --output s3://b/t.json" in str(caught.value)


def facts(ranks: int = 1, accelerator: str = "cpu", **changes: object) -> dict[str, str | int | bool]:
    return facts_of(training(**changes), ranks=ranks, accelerator=accelerator)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (facts(accelerator="NVIDIA H200"), "accelerator NVIDIA H200 (measured: cpu)"),
        (facts(dtype="fp32"), "dtype fp32 (measured: bf16)"),
        (facts(optim={"ema_decay": None}), "ema False (measured: True)"),
        (facts(vae={"type": "codec", "channels": 4}), "vae codec"),
        (facts(train={"steps": 1, "accumulation": 2}), "several micro-batches"),
    ],
)
def test_a_table_for_something_else_is_refused(
    other: dict[str, str | int | bool], named: str, machine: Machine, tmp_path: Path
) -> None:
    table = search(machine, tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_facts(table, other, uri="t")
    assert named in str(caught.value)


def test_a_table_holds_for_the_same_training_elsewhere(machine: Machine, tmp_path: Path) -> None:
    table = search(machine, tmp_path)
    weights = {**CONFIG["model"], "from_pretrained": "weights.safetensors"}  # type: ignore[dict-item]
    assert check_facts(table, facts(run_uri="other", seed=5, model=weights), uri="t") == []
    assert check_facts(table, facts(ranks=8), uri="t") == []


def test_fewer_ranks_than_were_measured_are_told(machine: Machine, tmp_path: Path) -> None:
    table = search(machine, tmp_path)
    wide = replace(table, facts={**table.facts, "shards": 8})
    assert "2 ranks instead of 8" in check_facts(wide, facts(ranks=2), uri="t")[0]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "facts": 3}', "no json"])
def test_a_file_that_is_no_table_is_told(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(DataError, match="no table of batch sizes"):
        read_batch_table(str(path), storage=StorageConfig())


def test_the_largest_shape_stands_for_a_bucket() -> None:
    config = training(data={"path": "m", "bucket_config": {"240p": {51: [1.0, 1]}}})
    shape = largest_shape(config, "240p/51")

    def tokens(height: int, width: int) -> int:  # 8 pixels a latent, 2 latents a patch, padded
        return -(-(height // 8) // 2) * -(-(width // 8) // 2)

    assert tokens(shape.height, shape.width) == max(tokens(*size) for size in ASPECT_RATIOS["240p"][1].values())
    with pytest.raises(UsageError):
        largest_shape(config, "240p/17")


# ------------------------------------------------------------------------------------------- command line and report


def test_flags_of_search_and_training_go_where_they_belong() -> None:
    command = parse_search_command(
        ["c.yaml", "--bucket", "240p/51", "144p/1", "--memory-budget", "2GiB", "--data-path", "a.csv", "optim.lr=1e-3"]
    )
    settings = load_search_config(command.search)
    assert settings.bucket == ("240p/51", "144p/1")
    assert settings.budget_bytes == 2 * 2**30
    assert command.train.config == "c.yaml"
    assert command.train.flags == {"data_path": "a.csv"}
    assert command.train.overrides == ("optim.lr=1e-3",)


def test_an_unknown_flag_is_told_with_the_one_that_was_meant() -> None:
    with pytest.raises(UsageError) as caught:
        parse_search_command(["c.yaml", "--memory-buget", "2GiB"])
    assert "--memory-budget" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 * 2**30),
        ("2Gi", 2 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("12345", 12345),
        ("64k", 64_000),
    ],
)
def test_sizes_are_understood_as_kubernetes_and_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text, name="x") == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "2iB", "2 gallons", "1e9x"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="memory_budget"):
        parse_bytes(text, name="memory_budget")


def test_evidence_survives_its_short_form() -> None:
    evidence = Evidence((Point(1, 2**30, 0.5), Point(12, 2**34, 123.5)), (16, 32))
    assert format_known(evidence) == "1:1073741824:0.5 12:17179869184:123.5 16:oom 32:oom"
    assert parse_known(format_known(evidence).split()) == evidence


def test_a_report_fits_into_a_termination_message_and_keeps_its_numbers() -> None:
    points = tuple(Point(10**5 + i, 10**12 + i, 1234.5) for i in range(MAX_MEASUREMENTS))
    report = SearchReport(
        bucket="2048/4096",
        known=format_known(Evidence(points)),
        facts={**facts(), "memory_bytes": 10**12, "torch": "2.13.0+cu130"},
        reason="é" * 9000,
        code=86,
    )
    text = report.to_json()
    assert len(text.encode()) <= 4096
    read = json.loads(text)
    assert read["known"] == report.known
    assert read["facts"] == report.facts
    assert len(read["reason"]) > 1000
