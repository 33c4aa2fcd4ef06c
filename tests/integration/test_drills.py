"""Bad days of a run: stopped in every phase, hung, killed, out of memory, superseded, cut off from its data."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training_runs import STEPS, Run, assert_equal_within, environment

from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
def run(catalogue: Path, tmp_path: Path) -> Run:
    """A run that saves, validates and samples."""
    settings = [
        "checkpoint.every_steps=2",
        f"validation.path={catalogue}", "validation.every_steps=3", "validation.max_batches=2",
        "samples.every_steps=4", "samples.prompts=[a clip]", "samples.num_sampling_steps=2",
    ]  # fmt: skip
    return Run(tmp_path / "run", catalogue, settings)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command; a test that fails leaves none running."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, env={**environment(), **environ}, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("phase", "count", "expected"),
    [
        # Four in each step and three in each validation.
        ("data wait", 4 * 6 + 2 * 3 + 1, {6}),  # the first of step 7: not begun, so step 6 is the last
        ("data wait", 4 * 6 + 2 * 3 + 3, {6, 7}),  # step 7 is finished if its clips are there
        ("forward/backward", 9 * 6 + 3, {6, 7}),
        ("saving", 3, {6}),
        ("validation", 2, {6}),
        ("sampling", 1, {4}),
    ],
)
def test_a_stop_in_any_phase_saves_and_exits_75(
    run: Run, one_rank: Run, phase: str, count: int, expected: set[int]
) -> None:
    said = run.train_with(f"sigterm,{phase},{count},1", expect=75)
    saved = run.saved_steps()[-1]
    assert saved in expected
    assert f"stopped after step {saved}; the same command continues from there" in said
    assert [run.end_record(1, rank).code for rank in (0, 1)] == [75, 75]
    if phase in ("forward/backward", "sampling"):
        run.train(2)
        assert_equal_within(run, one_rank, 1e-10)


def test_a_stop_during_start_up_has_nothing_to_save(run: Run, start: Start) -> None:
    process = start(run.command(2))
    wait_until(lambda: (run.folder / "attempts/1/started.json").exists(), process)
    time.sleep(2)  # the ranks import torch
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert run.saved_steps() == []


def test_a_stop_reaches_a_rank_that_waits_for_another_one(run: Run, start: Start) -> None:
    """It stands in torch's rendezvous, which no Python code interrupts."""
    command = run.command(2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(100)
        process = start(
            [command[0], "-m", *command[command.index("opensora.train") :]],
            RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(silent.getsockname()[1]),
        )  # fmt: skip
        connection, _ = silent.accept()
        with connection:
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "SIGTERM in start-up: nothing to save yet" in said


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_a_stop_while_the_clips_do_not_come_waits_neither_for_them_nor_for_a_deadline(
    sharding: str, run: Run, start: Start, catalogue: Path, bucket: str, object_store: ObjectStore, tmp_path: Path
) -> None:
    for clip in catalogue.parent.iterdir():
        Storage(f"s3://{bucket}/clips").write(clip.name, clip.read_bytes())
    settings = (f"data.path=s3://{bucket}/clips/clips.csv", "train.steps=1000000", f"parallel.sharding={sharding}")
    command = run.command(2, *settings)
    process = start(command)
    assert object_store.pid is not None
    try:
        wait_until(lambda: run.saved_steps(), process)
        os.kill(object_store.pid, signal.SIGSTOP)
        time.sleep(5)  # what was read ahead is used up
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75, said
    finally:
        os.kill(object_store.pid, signal.SIGCONT)
    assert {run.end_record(1, rank).code for rank in (0, 1)} == {75}
    assert run.saved_steps()[-1] == run.end_record(1, 0).step


def test_a_rank_that_hangs_is_named_before_those_that_wait_for_it(run: Run) -> None:
    patience = ("watchdog.floor_seconds=6", "watchdog.factor=3", "storage.retry_deadline_seconds=2")
    said = run.train_with("hang,forward/backward,31,1", *patience, expect=85)
    assert "rank 1 failed first: stalled (85) in forward/backward at step 4, bucket 144p/17/" in said
    assert len(run.end_record(1, 1).samples) == 2
    assert "stand_still_for_ever" in (run.folder / "dumps/attempt-1/rank-1.txt").read_text()
    run.train(2)
    assert sorted(run.losses()) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("deadline", [3, 600], ids=["the deadline", "a second signal"])
def test_a_step_that_does_not_end_is_given_up(run: Run, start: Start, deadline: int) -> None:
    program = str(Path(__file__).with_name("drill_ranks.py"))
    command = run.command(2, f"checkpoint.stop_deadline_seconds={deadline}", program=program)
    process = start(command, OPENSORA_DRILL="hang,forward/backward,31,1")
    assert process.stderr is not None
    assert any("standing still" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    if deadline == 600:
        time.sleep(2)
        assert process.poll() is None, "the first signal waits for the step"
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "the last complete checkpoint is untouched" in said
    assert run.end_record(1, 1).phase == "forward/backward"
    assert run.saved_steps() == [2]


def test_a_killed_rank_is_named_and_its_peer_has_lost_it(run: Run) -> None:
    said = run.train_with("die,forward/backward,31,1", expect=1)
    assert "rank 1 failed first: failed (1)" in said
    assert "SIGKILL" in said
    assert run.end_record(1, 0).code == 84
    assert run.saved_steps()[-1] == 2


def test_a_rank_without_memory_is_86(run: Run, small_cgroup: Path) -> None:
    said = run.train_with("eat,encode,9,1", expect=86, OPENSORA_DRILL_CGROUP=str(small_cgroup))
    assert "rank 1 failed first: out of memory (86)" in said
    assert run.end_record(1, 0).code == 84


def test_losing_the_other_machine_is_84(run: Run, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = run.command(1)
    machines = [
        start(
            [
                *command[:3],
                "--nnodes=2",
                f"--node-rank={node}",
                "--master-addr=127.0.0.1",
                f"--master-port={port}",
                *command[3:],
            ],
            OPENSORA_ATTEMPT="1",
        )
        for node in range(2)
    ]
    wait_until(run.saved_steps, machines[0])
    machines[1].kill()
    machines[1].communicate()
    _, said = machines[0].communicate(timeout=60)
    assert machines[0].returncode == 84, said
    assert "another rank is gone" in said


def test_an_older_attempt_ends_with_89_and_commits_nothing_more(run: Run, start: Start) -> None:
    old = start(run.command(2, "train.steps=1000000"))
    wait_until(run.saved_steps, old)
    (run.folder / "attempts/2").mkdir()
    _, said = old.communicate(timeout=100)
    assert old.returncode == 89, said
    assert "is superseded by attempt 2" in said
    kept = run.saved_steps()[-1]
    time.sleep(1)
    assert run.saved_steps()[-1] == kept, "a superseded attempt commits nothing more"


def test_ctrl_c_without_a_launcher_saves_and_ends_with_75(run: Run, start: Start) -> None:
    command = run.command(1)
    command = [command[0], "-m", *command[command.index("opensora.train") :]]
    process = start(command)
    wait_until(run.saved_steps, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    saved = run.saved_steps()[-1]
    assert f"stopped after step {saved}; the same command continues from there" in said


def test_launcher_and_ranks_must_agree_on_the_run_directory(run: Run, tmp_path: Path) -> None:
    done = run.train(1, f"run_uri={tmp_path}/other", expect=78)
    assert f"run_uri is {tmp_path}/other, but the launcher was given --run-uri {run.folder}" in done.stderr


def test_what_would_change_the_order_of_samples_is_refused_by_name(one_rank: Run) -> None:
    done = one_rank.train(1, "data.repeats=5", expect=78)
    assert "begun with another data.repeats (4, now 5)" in done.stderr
