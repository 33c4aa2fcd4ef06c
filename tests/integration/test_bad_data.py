"""Bad input of every kind through real training: a clear error with its exit code, or a counted skip that is exact."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import CONFIG, Run, environment

from opensora import records
from opensora.checkpoint import find_checkpoints, read_checkpoint_tensors
from opensora.storage import Storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

COLUMNS = ("path", "text", "num_frames", "height", "width")
BUCKETS = {"144p": {1: [1.0, 2], 5: [1.0, 2]}}
STEPS = 4
VIDEO, TIFF, JPEG = 5, 12, 13
"""Rows of the catalogue that get bad files."""
SCRIPT = Path(__file__).with_name("bad_data_ranks.py")


# ------------------------------------------------------------------------------------------------------ bad files


def audio_only(good: bytes) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        for number in range(5):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 8000, number * 1024
            container.mux(stream.encode(tone))
        container.mux(stream.encode(None))
    return target.getvalue()


def without_frames(good: bytes) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    return target.getvalue()


def with_nan_pixels(good: bytes) -> bytes:
    pixels = np.full((144, 256), 0.5, np.float32)
    pixels[3, :7] = np.nan
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="TIFF")
    return target.getvalue()


@dataclass(frozen=True)
class BadFile:
    """A file that training meets, in place of a good one."""

    row: int
    make: Callable[[bytes], bytes | None]
    """From the content of a good file to that of the bad one; None for no file at all."""
    reason: str
    """What is said about it."""
    weighting: str = "micro_batch"


BAD_FILES = {
    "cut-off": BadFile(VIDEO, lambda good: good[:-1000], "cut off: 20 frames are listed", "sample"),
    "empty": BadFile(VIDEO, lambda good: b"", "the file is empty", "sample"),
    "audio-only": BadFile(VIDEO, audio_only, "no video in it, only audio"),
    "no-frames": BadFile(VIDEO, without_frames, "no video in it"),
    "text": BadFile(VIDEO, lambda good: b"These are words, no video.", "begins with the text 'These are words,'"),
    "missing": BadFile(VIDEO, lambda good: None, "does not exist", "token"),
    "nan-pixels": BadFile(TIFF, with_nan_pixels, r"7 of 36864 pixels are not finite \(NaN\)", "token"),
    "video-named-jpg": BadFile(JPEG, lambda good: good, r"not an image \(it begins like an MP4 file\)", "sample"),
}


# ------------------------------------------------------------------------------------------------------- the runs


@dataclass
class Case:
    """A run, and how it ended."""

    folder: Path
    config: dict[str, Any]
    absent: Sequence[int] = ()
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Run:
        return Run(Path(self.config["run_uri"]), Path(self.config["data"]["path"]))

    @property
    def log(self) -> str:
        return "\n".join(line for said in self.outcome["log"] for line in said)

    def metrics(self) -> list[dict[str, Any]]:
        parts = sorted(self.run.folder.glob("metrics/attempt-1/part-*.jsonl"))
        return [json.loads(line) for part in parts for line in part.read_text().splitlines()]

    def skipped(self) -> list[dict[str, Any]]:
        parts = sorted((self.run.folder / records.skipped_prefix(1)).glob("part-*.jsonl"))
        return [json.loads(line) for part in parts for line in part.read_text().splitlines()]

    def launch(self, ranks: int, *, expect: int) -> str:
        """Train with the launcher; returns what was said on standard error."""
        settings = self.folder / "run.json"
        settings.write_text(json.dumps(self.config))
        launcher = [sys.executable, "-m", "opensora.launch", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*launcher, "--run-uri", self.config["run_uri"], "opensora.train", str(settings)],
            capture_output=True, text=True, timeout=300, check=False, env=environment(),
        )  # fmt: skip
        assert done.returncode == expect, done.stderr[-4000:]
        return done.stderr


class Cases:
    """Makes runs, and plays them in one process for each rank."""

    def __init__(self, folder: Path, clips: Path) -> None:
        self.folder = folder
        self.good = folder / "clips"
        shutil.copytree(clips.parent, self.good)
        self.rows = list(csv.DictReader(io.StringIO(clips.read_text())))
        generator = np.random.default_rng(1)
        for number, kind in ((TIFF, "tif"), (JPEG, "jpg"), (14, "png"), (15, "bmp")):
            name = f"{number}.{kind}"
            Image.fromarray(generator.integers(0, 256, (144, 256, 3), dtype=np.uint8)).save(self.good / name)
            row = (name, f"picture number {number}", "1", "144", "256")
            self.rows.append(dict(zip(COLUMNS, row, strict=True)))

    def make(
        self,
        name: str,
        *,
        changed: Mapping[int, Mapping[str, str]] | None = None,
        added: Sequence[Mapping[str, str]] = (),
        columns: Sequence[str] = COLUMNS,
        absent: Sequence[int] = (),
        **settings: Any,
    ) -> Case:
        """A run over the catalogue with some rows changed; settings as `train__steps=3`."""
        folder = self.folder / name
        folder.mkdir()
        rows = [{**row, **(changed or {}).get(number, {})} for number, row in enumerate([*self.rows, *added])]
        with open(folder / "clips.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        config: dict[str, Any] = deepcopy(CONFIG)
        config["train"] |= {"steps": STEPS, "micro_batches_per_step": 4, "log_every": 100}
        config["checkpoint"] = {"every_steps": 0}
        config["data"] = {"path": str(folder / "clips.csv"), "root": str(self.good), "bucket_config": BUCKETS}
        config["run_uri"] = str(folder / "run")
        for key, value in settings.items():
            section, _, option = key.partition("__")
            config[section][option] = value
        return Case(folder, config, absent)

    def bad_file(self, name: str, bad: BadFile, **settings: Any) -> Case:
        """A run in which one row has a bad file."""
        path = self.path_of(name, bad)
        path.parent.mkdir()
        source = f"{VIDEO}.mp4" if bad.row != TIFF else f"{TIFF}.tif"
        content = bad.make((self.good / source).read_bytes())
        if content is not None:
            path.write_bytes(content)
        return self.make(name, changed={bad.row: {"path": str(path)}}, train__loss_weighting=bad.weighting, **settings)

    def path_of(self, name: str, bad: BadFile) -> Path:
        return self.folder / f"{name}-files" / self.rows[bad.row]["path"]

    def play(self, cases: Mapping[str, Case], *, ranks: int) -> Mapping[str, Case]:
        table = self.folder / "cases.json"
        table.write_text(json.dumps({name: {"config": c.config, "absent": c.absent} for name, c in cases.items()}))
        launcher = [sys.executable, "-m", "opensora.launch", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*launcher, str(SCRIPT), str(table), str(self.folder)],
            capture_output=True, text=True, timeout=300, check=False, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        for name, case in cases.items():
            case.outcome = json.loads((self.folder / f"{name}.json").read_text())
        return cases


Played = tuple[Cases, Mapping[str, Case]]

MISSING_BOTH = {5: {"path": "gone/5.mp4"}, 7: {"path": "gone/7.mp4"}}
"""The clips of one whole micro-batch, where nothing is shuffled."""
IN_ORDER = {"data__shuffle": False, "train__balance_window": 1, "optim__warmup_steps": 0, "train__steps": 8}


def left_out(cases: Cases) -> dict[str, Case]:
    """Runs that leave out what they cannot read."""
    skip = {"data__bad_clip": "skip", "changed": MISSING_BOTH, **IN_ORDER}
    every_step = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 9}
    return {
        **{name: cases.bad_file(name, bad, data__bad_clip="skip") for name, bad in BAD_FILES.items()},
        "empty-step": cases.make("empty-step", **skip, **every_step, train__micro_batches_per_step=1),
        "empty-micro-batch": cases.make("empty-micro-batch", **skip, train__micro_batches_per_step=2),
    }


TRUTHS = {(bad.row, bad.weighting) for bad in BAD_FILES.values()}
NEW_ROW = dict(zip(COLUMNS, ("16.mp4", "one more", "20", "144", "256"), strict=True))
DROPPED = (
    ({"path": "16.xyz"}, r"1 with an unknown file extension \(first: row 16, path '16.xyz'\)"),
    ({"height": "tall"}, r"1 with height missing or not a number \(first: row 17, path '16.mp4'\)"),
    ({"path": ""}, r"1 with an empty path \(first: row 18, path ''\)"),
    ({"path": "16.jpg"}, r"1 with an image of more than one frame \(first: row 19, path '16.jpg'\)"),
)
TOO_MANY = {
    "changed": {number: {"path": f"gone/{number}.mp4"} for number in (1, 5, 9)},
    "data__bad_clip": "skip",
    "data__max_skips": 2,
}
UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no-column": ({"columns": COLUMNS[:-1]}, r"clips.csv has no column 'width'; its columns are 'path', 'text'"),
    "no-usable-row": (
        {"changed": {number: {"num_frames": "many"} for number in range(16)}},
        r"no usable row: 16 rows in the file; 16 with num_frames missing or not a number \(first: row 0, path '0.mp4'",
    ),
    "no-bucket": (
        {"data__bucket_config": {"1080p": {51: [1.0, 2]}}},
        r"no bucket takes any of the 16 rows .*1 to 20 frames.*the buckets have 1080p/51",
    ),
    "no-full-batch": (
        {"data__bucket_config": {"144p": {17: [1.0, 50]}}}, r"no bucket gets a full batch .*6 rows, batch size 50"
    ),
    "too-many-bad": (
        TOO_MANY,
        r"3 clips cannot be read, more than data.max_skips=2; the last one: .*/gone/\d.mp4 does not exist",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_rank_cases(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    cases = Cases(tmp_path_factory.mktemp("bad-1"), catalogue)
    table = {
        **left_out(cases),
        "good": cases.make("good"),
        "unusable-rows": cases.make("unusable-rows", added=[{**NEW_ROW, **change} for change, _ in DROPPED]),
        "odd-rows": cases.make(
            "odd-rows",
            changed={VIDEO: {"text": "  "}},
            added=[{**NEW_ROW, "path": "3.mp4"}] * 2,
            train__steps=1,
            train__micro_batches_per_step=9,
        ),
        # The same steps without the one of which nothing is left: its rows are not in the catalogue.
        "step-left-out": cases.make(
            "step-left-out",
            changed={5: {"path": ""}, 7: {"path": ""}},
            train__micro_batches_per_step=1,
            **{**IN_ORDER, "train__steps": 7},
        ),
        "micro-batch-absent": cases.make(
            "micro-batch-absent", absent=[5, 7], train__micro_batches_per_step=2, **IN_ORDER
        ),
    }
    for row, weighting in TRUTHS:
        name = f"absent-{row}-{weighting}"
        table[name] = cases.make(name, absent=[row], train__loss_weighting=weighting)
    for name, bad in BAD_FILES.items():
        table[f"{name}-fails"] = cases.bad_file(f"{name}-fails", bad)
    for name, (options, _) in UNUSABLE.items():
        table[name] = cases.make(name, **options)
    return cases, cases.play(table, ranks=1)


@pytest.fixture(scope="module")
def two_rank_cases(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    cases = Cases(tmp_path_factory.mktemp("bad-2"), catalogue)
    table = {
        **left_out(cases),
        "one-epoch": cases.bad_file("one-epoch", BAD_FILES["cut-off"], data__bad_clip="skip", train__steps=2),
        # In the first step each rank meets one bad clip: all ranks end together, after that step's exchange.
        "too-many-together": cases.make(
            "too-many-together",
            changed={number: {"path": f"gone/{number}.mp4"} for number in (0, 1, 4, 5)},
            data__bad_clip="skip",
            data__max_skips=1,
            train__micro_batches_per_step=2,
            **IN_ORDER,
        ),
    }
    return cases, cases.play(table, ranks=2)


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_clip_ends_the_run_with_65_and_is_named(name: str, one_rank_cases: Played) -> None:
    cases, played = one_rank_cases
    outcome, bad = played[f"{name}-fails"].outcome, BAD_FILES[name]
    uri = str(cases.path_of(f"{name}-fails", bad))
    assert outcome["code"] == 65
    assert re.search(rf"bad data \(65\) in data wait at step \d, bucket 144p/.*: {re.escape(uri)}", outcome["record"])
    assert re.search(bad.reason, outcome["record"])
    assert uri in outcome["samples"]
    assert outcome["hint"]


def assert_left_out(case: Case, uri: str, reason: str) -> None:
    """The run ends well; the clip is told in the log, counted in the metrics and listed in the run directory."""
    assert case.outcome["code"] == 0
    assert re.search(rf"left out {re.escape(uri)}: .*({reason})", case.log)
    lines = case.metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    listed = case.skipped()
    assert {entry["uri"] for entry in listed} == {uri}
    assert all(re.search(reason, entry["reason"]) for entry in listed)
    assert [entry["epoch"] for entry in listed] == [0, 1]
    for line in lines:
        assert line["skipped_clips"] == sum(entry["step"] <= line["step"] for entry in listed)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_clip_left_out_changes_nothing_else(name: str, one_rank_cases: Played) -> None:
    """Losses and weights are, bit for bit, those of the run in which the clip is cut out of its micro-batch."""
    cases, played = one_rank_cases
    bad = BAD_FILES[name]
    assert_left_out(played[name], str(cases.path_of(name, bad)), bad.reason)
    expected = played[f"absent-{bad.row}-{bad.weighting}"].run
    assert played[name].run.losses() == expected.losses()
    ours, theirs = played[name].run.weights(), expected.weights()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert played["good"].run.losses() != expected.losses()


@pytest.mark.parametrize("name", BAD_FILES)
def test_two_ranks_leave_out_the_same(name: str, one_rank_cases: Played, two_rank_cases: Played) -> None:
    bad = BAD_FILES[name]
    cases, played = two_rank_cases
    assert_left_out(played[name], str(cases.path_of(name, bad)), bad.reason)
    assert_close(played[name].run.losses(), one_rank_cases[1][f"absent-{bad.row}-{bad.weighting}"].run.losses())


def assert_close(actual: Mapping[int, float], expected: Mapping[int, float]) -> None:
    assert actual.keys() == expected.keys()
    assert [actual[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-10)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_micro_batch_of_which_nothing_is_left_does_not_count(
    ranks: int, one_rank_cases: Played, two_rank_cases: Played
) -> None:
    alone = one_rank_cases[1]
    played = alone if ranks == 1 else two_rank_cases[1]
    assert_close(played["empty-micro-batch"].run.losses(), alone["micro-batch-absent"].run.losses())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_of_which_nothing_is_left_changes_no_weight_and_has_no_loss(
    ranks: int, one_rank_cases: Played, two_rank_cases: Played
) -> None:
    alone = one_rank_cases[1]
    case = (alone if ranks == 1 else two_rank_cases[1])["empty-step"]
    assert case.outcome["code"] == 0
    lines = case.metrics()
    assert [line["step"] for line in lines] == list(range(1, 9))
    (empty,) = [line for line in lines if line["loss"] is None]
    assert 1 < empty["step"] < 8
    assert (empty["samples_per_second"], empty["skipped_clips"]) == (0, 2)
    assert f"step {empty['step']}: every clip was left out; the weights stay as they are" in case.log

    # The checkpoints before and after it are the same, those around it are not.
    run = Storage(str(case.run.folder))
    saved = {info.step: read_checkpoint_tensors(run, info, prefix="") for info in find_checkpoints(run)}
    before, after = saved[empty["step"] - 1], saved[empty["step"]]
    assert any(name.startswith("ema.") for name in before)
    assert any(name.startswith("optim.") for name in before)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not all(torch.equal(tensor, after[name]) for name, tensor in saved[empty["step"] + 1].items())

    # And the others are those of a run that has no such step.
    others = [line["loss"] for line in lines if line is not empty]
    assert others == pytest.approx(list(alone["step-left-out"].run.losses().values()), rel=1e-10)


def test_rows_that_cannot_be_used_are_counted_and_change_nothing_else(
    one_rank_cases: Played,
) -> None:
    case, good = one_rank_cases[1]["unusable-rows"], one_rank_cases[1]["good"]
    assert case.outcome["code"] == 0
    for _, reason in DROPPED:
        assert re.search(rf"clips.csv: left out: {reason}", case.log)
    assert case.run.losses() == good.run.losses()


def test_rows_that_are_merely_odd_are_counted_and_trained_on(
    one_rank_cases: Played,
) -> None:
    case = one_rank_cases[1]["odd-rows"]
    assert case.outcome["code"] == 0
    assert "1 rows have no caption" in case.log
    assert "2 rows have the path of an earlier row; all are kept" in case.log
    (line,) = case.metrics()
    assert line["samples_per_second"] * line["step_seconds"] == pytest.approx(18)
    assert line["loss"] > 0


@pytest.mark.parametrize("name", UNUSABLE)
def test_data_that_cannot_be_trained_on_ends_the_run_with_65(name: str, one_rank_cases: Played) -> None:
    outcome = one_rank_cases[1][name].outcome
    assert outcome["code"] == 65
    assert re.search(UNUSABLE[name][1], outcome["record"])
    assert outcome["hint"]


# ------------------------------------------------------------------------------------------- through the launcher


def test_the_launcher_names_the_rank_that_read_the_bad_clip(
    two_rank_cases: Played, catalogue: Path, tmp_path: Path
) -> None:
    # Which rank that is, is told by the run that leaves the clip out: it has the same steps.
    said = two_rank_cases[1]["one-epoch"].outcome["log"]
    (culprit,) = [rank for rank in (0, 1) if any("left out" in line for line in said[rank])]
    cases, bad = Cases(tmp_path, catalogue), BAD_FILES["cut-off"]
    case, uri = cases.bad_file("cut-off", bad), str(cases.path_of("cut-off", bad))
    text = case.launch(2, expect=65)
    prefix = "[rank 1] " if culprit else ""
    assert f"\n{prefix}error: {uri}: cut off: 20 frames are listed" in text
    assert f"\n{prefix}hint: copy the file again, or remove it from the catalogue" in text
    verdict = case.run.verdict(1)
    assert verdict.codes == {str(culprit): 65, str(1 - culprit): 84}
    assert f"rank {culprit} failed first: bad data (65) in data wait at step" in verdict.message
    assert verdict.message in text
    assert verdict.first is not None
    assert uri in verdict.first.samples
    assert not find_checkpoints(Storage(str(case.run.folder)))


def test_a_rank_that_meets_too_many_bad_clips_ends_the_run_with_65(catalogue: Path, tmp_path: Path) -> None:
    case = Cases(tmp_path, catalogue).make("too-many", **{**TOO_MANY, "data__max_skips": 0})
    text = case.launch(2, expect=65)
    said = r"1 clips cannot be read, more than data.max_skips=0; the last one: .*/gone/\d.mp4 does not exist"
    assert re.search(rf"error: {said}", text)
    assert re.search(rf"failed first: bad data \(65\) in data wait at step \d.*{said}", text)
    assert "hint: remove them from the catalogue (the log names each), or raise data.max_skips" in text


def test_ranks_that_meet_too_many_bad_clips_together_end_with_65(two_rank_cases: Played) -> None:
    case = two_rank_cases[1]["too-many-together"]
    assert case.outcome["code"] == 65
    assert re.search(r"at step 1: 2 clips cannot be read, more than data.max_skips=1", case.outcome["record"])
    assert all(sum("left out" in line for line in said) == 1 for said in case.outcome["log"])
    assert [entry["step"] for entry in case.skipped()] == [1, 1]
