"""`osctl train --local`: what a run promises on a cluster, it keeps on one machine, from the same run file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml
from local_runs import LocalRun
from run_assertions import (
    HASTY_WATCHDOG,
    SAVE_EVERY,
    STEPS,
    assert_crash_is_told,
    assert_ends_like,
    assert_hang_is_told,
    assert_undisturbed,
    assert_wrong_config_is_not_tried_again,
    small_config,
    wait_until,
)

from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
NewRun = Callable[[str], LocalRun]


@pytest.fixture(scope="module")
def new_run(object_store: ObjectStore, catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewRun]:
    """Makes runs by name, in a bucket with real clips. They end with the tests."""
    bucket = f"local-{uuid4().hex[:8]}"
    object_store.create_bucket(bucket)
    runs: list[LocalRun] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.environment().items():
            patch.setenv(name, value)
        for path in catalogue.parent.iterdir():
            Storage(f"s3://{bucket}/clips").upload(path, path.name)

        def make(name: str) -> LocalRun:
            uri = f"s3://{bucket}/runs/{name}"
            clips = f"s3://{bucket}/clips/{catalogue.name}"
            runs.append(LocalRun(name, run_uri=uri, catalogue=clips, folder=tmp_path_factory.mktemp(name)))
            return runs[-1]

        yield make
        for run in runs:
            run.close()


@pytest.fixture(scope="module")
def truth(new_run: NewRun) -> dict[int, float]:
    """The losses of a run that nothing happens to."""
    run = new_run("undisturbed").create()
    losses = assert_undisturbed(run)
    code, story = run.end()
    assert code == 0, run.said()
    assert (story["phase"], story["status"]["progress"]["step"]) == ("Succeeded", STEPS)
    said = run.said()
    for words in ("2 nodes with 4 ranks in all", "[launcher 1] attempt 1", f"step {STEPS}/{STEPS}", "Succeeded"):
        assert words in said
    return losses


def test_crashes_and_hangs_change_no_loss(new_run: NewRun, truth: dict[int, float]) -> None:
    run = new_run("failures").create("storage.retry_deadline_seconds=10", watchdog=HASTY_WATCHDOG)
    crashed = assert_crash_is_told(run, attempt=1, rank=3, after_step=SAVE_EVERY + 1)
    assert crashed["pod"] == "failures-a1-1"
    assert_hang_is_told(run, attempt=2, rank=2, after_step=2 * SAVE_EVERY + 1)
    status = assert_ends_like(run, truth)
    assert (status["attempt"], status["restarts"], status["disruptions"]) == (3, 2, 0)
    # Nothing is lost but what came after the last checkpoint.
    assert status["attempts"][2]["firstStep"] >= 2 * SAVE_EVERY
    code, story = run.end()
    assert (code, story["firstFailure"]["cause"]) == (0, "Hang")


def test_what_is_stopped_or_killed_goes_on_where_it_was(new_run: NewRun, truth: dict[int, float]) -> None:
    run = new_run("stopped").create()
    run.until_step(SAVE_EVERY + 1, attempt=1)
    run.interrupt()
    code, story = run.end()
    assert code == 7, run.said()
    assert (story["phase"], run.condition("Failed")["reason"]) == ("Failed", "Cancelled")
    first_end = run.saved_step(attempt=1)
    assert first_end == story["status"]["checkpoint"]["latestStep"] > SAVE_EVERY

    run.start().until_step(first_end + SAVE_EVERY, attempt=2)
    processes = run.processes()
    assert len(run.ranks(attempt=2)) == 4
    run.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive

    run.start()
    status = assert_ends_like(run, truth)
    assert (status["attempt"], status["phase"]) == (3, "Succeeded")
    assert run.end()[0] == 0
    assert sorted(run.steps()[1]) == list(range(1, first_end + 1))
    assert run.steps()[2][0] == first_end + 1


def test_what_cannot_work_is_not_tried_again(new_run: NewRun) -> None:
    refused = new_run("refused")
    refused.write_file("model.type=STDiT9")
    assert refused.start().end() == (2, {})
    assert "STDiT9" in refused.said()

    # What is in an image nobody can check but the ranks.
    run = new_run("no-such-model")
    file = run.folder / "config.yaml"
    file.write_text(yaml.safe_dump(small_config(run.catalogue)))
    run.create(config={"file": str(file), "overrides": ["model.type=STDiT9"]})
    assert_wrong_config_is_not_tried_again(run)
    assert run.end()[0] == 6
    assert "error: no-such-model has failed: NonRetryableExit" in run.said()


def test_a_second_signal_ends_it_at_once(new_run: NewRun) -> None:
    run = new_run("killed").create(terminationGracePeriodSeconds=300)
    run.until_step(2, attempt=1)
    ranks = run.ranks(attempt=1)
    for rank in ranks.values():
        rank.suspend()  # so that none of them saves
    run.interrupt()
    wait_until(lambda: "once more ends them at once" in run.said(), seconds=30, what="word of the first signal")
    run.interrupt()
    code, story = run.end()
    assert (code, story["phase"]) == (7, "Failed")
    _, alive = psutil.wait_procs(list(ranks.values()), timeout=30)
    assert not alive
