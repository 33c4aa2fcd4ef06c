"""The object store goes away in the middle of training: the run waits for it, and nothing is lost or doubled."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import CONFIG, environment

from opensora.checkpoint import find_checkpoints, read_checkpoint_tensors
from opensora.checkpoint.manifest import scan_checkpoints
from opensora.quickstart.object_store import ObjectStore
from opensora.records import Verdict, metrics_prefix, verdict_path
from opensora.storage import Storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 30
SAVED_EVERY = 5
OUTAGE_SECONDS = 20.0


_started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """A test that fails takes its launcher with it, and that takes its ranks."""
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


@dataclass
class Run:
    """A run of two ranks whose clips and directory are in folders or in an object store."""

    catalogue: str
    uri: str
    folder: Path
    """For what the test itself keeps."""

    def start(self, **storage: float) -> subprocess.Popen[bytes]:
        config = {
            **CONFIG,
            "train": {**CONFIG["train"], "steps": STEPS, "micro_batches_per_step": 2},  # type: ignore[dict-item]
            "data": {
                "path": self.catalogue, "bucket_config": {"144p": {17: [1.0, 2]}}, "repeats": 4, "prefetch_batches": 1,
            },
            "checkpoint": {"every_steps": SAVED_EVERY, "keep_last": 99},
            "storage": storage,
            "run_uri": self.uri,
        }  # fmt: skip
        path = self.folder / "config.json"
        path.write_text(json.dumps(config))
        launcher = [sys.executable, "-m", "opensora.launch", "--nproc-per-node", "2", "--run-uri", self.uri]
        with open(self.folder / "said.txt", "ab") as said:
            process = subprocess.Popen([*launcher, "opensora.train", str(path)], stderr=said, env=environment())
        _started.append(process)
        return process

    def said(self) -> str:
        """Standard error of all attempts."""
        return (self.folder / "said.txt").read_text()

    def finish(self, process: subprocess.Popen[bytes], *, expect: int) -> None:
        assert process.wait(200) == expect, self.said()[-4000:]

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert process.poll() is None, self.said()[-4000:]
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    @property
    def storage(self) -> Storage:
        return Storage(self.uri)

    def metrics(self, attempt: int = 1) -> list[dict[str, Any]]:
        prefix = metrics_prefix(attempt)
        parts = [self.storage.read(f"{prefix}/{name}") for name in self.storage.list_names(prefix)]
        return [json.loads(line) for part in parts for line in part.splitlines()]

    def losses(self, attempt: int = 1) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in self.metrics(attempt)]

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, averages and optimiser of the newest checkpoint."""
        return read_checkpoint_tensors(self.storage, find_checkpoints(self.storage)[-1], prefix="")

    def saved_steps(self) -> list[int]:
        """The steps of all checkpoints, of which none is incomplete or damaged."""
        scan = scan_checkpoints(self.storage)
        assert not scan.incomplete
        for info in scan.complete:
            for item in info.manifest.objects:
                assert self.storage.digest(f"{info.path}/{item.path}") == item.sha256
        return [info.step for info in scan.complete]

    def verdict(self, attempt: int) -> Verdict:
        return Verdict.from_json(self.storage.read(verdict_path(attempt)))


@pytest.fixture(scope="module")
def undisturbed(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run without an object store."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(str(catalogue), str(folder / "run"), folder)
    run.finish(run.start(), expect=0)
    return run


@pytest.fixture
def uploaded(catalogue: Path, bucket: str) -> str:
    clips = Storage(f"s3://{bucket}/clips")
    for file in catalogue.parent.iterdir():
        clips.upload(file, file.name)
    return clips.uri_of(catalogue.name)


def longest_wait(lines: list[dict[str, Any]], phase: str) -> tuple[float, float]:
    """The longest time between the ends of two steps, and how much of it went to a phase."""
    before, after = max(itertools.pairwise(lines), key=lambda pair: float(pair[1]["time"] - pair[0]["time"]))
    return after["time"] - before["time"], after[f"seconds/{phase}"] - before.get(f"seconds/{phase}", 0.0)


def assert_nothing_lost(run: Run, undisturbed: Run) -> None:
    """Every step is there once and is, bit for bit, what it would have been; so are the final state and all saves."""
    assert run.losses() == undisturbed.losses()
    assert [step for step, _ in run.losses()] == list(range(1, STEPS + 1))
    ours, theirs = run.state(), undisturbed.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert run.saved_steps() == list(range(SAVED_EVERY, STEPS + 1, SAVED_EVERY))
    assert run.storage.list_names("attempts") == ["1"]
    assert run.verdict(1).codes == {"0": 0, "1": 0}
    assert not run.storage.list_names("dumps")
    assert not run.storage.list_names("skipped")


def assert_told(run: Run, store: ObjectStore, *, patience: str = "300") -> None:
    """It is said that the store is away and, with the length, that it is back; nobody speaks of failure."""
    said, store_at = run.said(), re.escape(f"storage at {store.endpoint_url}")
    assert re.search(rf"\n\[.*\] {store_at} does not answer \(.*\); retrying for up to {patience} s", said)
    seconds = re.findall(rf"\n\[\d.*\] {store_at} answers again after (\d+) s", said)
    assert len(seconds) == 1
    assert int(seconds[0]) >= OUTAGE_SECONDS - 2
    assert not re.search(r"error:|hint:|Traceback|failed|stalled|killed", said)


def outage(store: ObjectStore, run: Run, process: subprocess.Popen[bytes]) -> None:
    """The store is away for a while. The run must be there all the time."""
    store.kill()
    try:
        time.sleep(OUTAGE_SECONDS)
        assert process.poll() is None, run.said()[-4000:]
    finally:
        store.start()


def test_an_outage_while_clips_are_read_is_waited_out(
    uploaded: str, undisturbed: Run, object_store: ObjectStore, tmp_path: Path
) -> None:
    run = Run(uploaded, str(tmp_path / "run"), tmp_path)
    process = run.start()
    run.wait_until(lambda: SAVED_EVERY in [info.step for info in find_checkpoints(run.storage)], process)
    outage(object_store, run, process)
    run.finish(process, expect=0)
    waited, reading = longest_wait(run.metrics(), "data wait")
    idle = longest_wait(run.metrics(), "imbalance")[1]  # waiting for the other rank, which waits for its clips
    assert waited >= OUTAGE_SECONDS - 5
    assert reading + idle >= 0.9 * waited
    assert_told(run, object_store)
    assert_nothing_lost(run, undisturbed)


def test_an_outage_while_saving_is_waited_out(
    uploaded: str, catalogue: Path, undisturbed: Run, object_store: ObjectStore, tmp_path: Path
) -> None:
    """The run's directory is in the store, the clips are not: training goes on until the next save."""
    run = Run(str(catalogue), uploaded.replace("clips/clips.csv", "run"), tmp_path)
    process = run.start()
    # Two steps before the next save. Said in a local file: asking the store would take longer than these steps.
    run.wait_until(lambda: "step 8/" in run.said(), process)
    outage(object_store, run, process)
    run.finish(process, expect=0)
    saves = {int(step): float(seconds) for step, seconds in re.findall(r"saved step (\d+): .* in (\S+) s,", run.said())}
    assert max(saves.values()) >= OUTAGE_SECONDS - 2
    waited, saving = longest_wait(run.metrics(), "saving")
    assert waited >= OUTAGE_SECONDS / 2
    assert saving >= 0.9 * waited
    # Metrics, which are given up sooner and stored later, may be the first to notice.
    assert_told(run, object_store, patience="(300|10)")
    assert "is stored again" in run.said()
    assert_nothing_lost(run, undisturbed)


def test_a_store_that_stays_away_ends_the_run_and_the_same_command_continues_it(
    uploaded: str, undisturbed: Run, object_store: ObjectStore, tmp_path: Path
) -> None:
    run = Run(uploaded, str(tmp_path / "run"), tmp_path)
    patience = {"connect_timeout_seconds": 2.0, "read_timeout_seconds": 5.0, "retry_deadline_seconds": 4.0}
    process = run.start(**patience)
    run.wait_until(lambda: SAVED_EVERY in [info.step for info in find_checkpoints(run.storage)], process)
    object_store.kill()
    try:
        run.finish(process, expect=1)
    finally:
        object_store.start()
    assert f"error: storage at {object_store.endpoint_url} did not answer for 4 s" in run.said()
    assert "hint: run the same command again when it is back" in run.said()
    first = run.verdict(1).first
    assert first is not None
    assert (first.code, first.reason, first.phase) == (1, "StorageUnavailableError", "data wait")
    saved = run.saved_steps()
    assert saved[0] == SAVED_EVERY
    assert saved[-1] < STEPS

    run.finish(run.start(**patience), expect=0)
    assert f"attempt 2 continues from the checkpoint of step {saved[-1]}" in run.said()
    assert run.losses(2) == undisturbed.losses()[saved[-1] :]
    ours, theirs = run.state(), undisturbed.state()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
