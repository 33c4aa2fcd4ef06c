"""Checkpoints under fire: killed at any moment, resharded, one rank gone, the object store gone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.checkpoint import CheckpointManager, find_checkpoints, read_checkpoint_tensors
from opensora.checkpoint.manifest import scan_checkpoints
from opensora.config.train import CheckpointConfig
from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
NUM_KILLS = 20


class Ranks:
    """Starts the ranks of a scenario by forking a process that has imported torch."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        script = Path(__file__).with_name("checkpoint_ranks.py")
        self._parent = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._alive: set[int] = set()

    def start(self, scenario: str, *, ranks: int, folder: Path, run: Storage, **settings: object) -> list[int]:
        pids: list[int] = self._ask(scenario=scenario, ranks=ranks, folder=str(folder), run=run.uri, **settings)
        self._alive.update(pids)
        return pids

    def reap(self, pid: int) -> int:
        self._alive.discard(pid)
        code: int = self._ask(reap=pid)
        return code

    def run(self, scenario: str, *, ranks: int, folder: Path, run: Storage, **settings: object) -> None:
        pids = self.start(scenario, ranks=ranks, folder=folder, run=run, **settings)
        assert [self.reap(pid) for pid in pids] == [0] * ranks

    def close(self) -> None:
        for pid in self._alive:
            os.kill(pid, signal.SIGKILL)
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(timeout=30)
        self._parent.stdout.close()

    def _ask(self, **command: object) -> Any:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(command) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def single(run: Storage, *, attempt: int = 1) -> CheckpointManager:
    return CheckpointManager(run, attempt=attempt, config=CheckpointConfig(), is_main=True, process_group=None)


def reports(folder: Path, rank: int) -> list[str]:
    path = folder / f"rank-{rank}.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(params=["local", "object store"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "run"))
    return Storage(f"s3://{request.getfixturevalue('bucket')}/run")


@pytest.mark.timeout(600)
def test_a_run_killed_while_saving_always_goes_on_from_a_complete_state(
    ranks: Ranks, run: Storage, tmp_path: Path
) -> None:
    draws = random.Random(0)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    num_kills = num_partial = 0
    while num_kills < NUM_KILLS or num_partial < NUM_KILLS // 4:
        assert num_kills < 5 * NUM_KILLS, "the kills missed the saves, so this shows little"
        attempt = num_kills = num_kills + 1
        folder = tmp_path / f"attempt-{attempt}"
        folder.mkdir()
        settings = {"attempt": attempt, "environment": environment}
        (pid,) = ranks.start("save_forever", ranks=1, folder=folder, run=run, **settings)
        # Two saves (each is reported at its start and its end); the second one's length says when a third is under way.
        wait_until(lambda folder=folder: len(reports(folder, 0)) >= 3)
        start = time.monotonic()
        wait_until(lambda folder=folder: len(reports(folder, 0)) >= 4)
        time.sleep(draws.uniform(0, time.monotonic() - start))
        os.kill(pid, signal.SIGKILL)
        assert ranks.reap(pid) == -signal.SIGKILL, "it ended before it was killed"
        words = [line.split() for line in reports(folder, 0)]
        started = max(int(step) for word, step in words if word == "started")
        committed = max(int(step) for word, step in words if word == "committed")

        num_partial += any(left.step == started for left in scan_checkpoints(run).incomplete)
        manager = single(run)
        newest = manager.newest()
        assert newest is not None
        assert committed <= newest.step <= started
        state: dict[str, Any] = {f"w{i}": torch.zeros(50, 100) for i in range(6)}
        state["step"] = None
        assert manager.load(newest, state) == {"step": newest.step}
        assert state.pop("step") == newest.step
        assert all(torch.equal(tensor, torch.full((50, 100), float(newest.step))) for tensor in state.values())
    # Every start but the first could have left something behind; only the last one's leftovers may still be there.
    assert len(scan_checkpoints(run).incomplete) <= 1


def test_a_state_saved_on_two_ranks_loads_on_three_and_then_on_one_exactly(ranks: Ranks, tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    ranks.run("save_sharded", ranks=2, folder=tmp_path, run=run)
    truth = torch.load(tmp_path / "truth.pt")
    (info,) = find_checkpoints(run)
    assert info.manifest.num_ranks == 2
    writers = {item.path.split("-")[1] for item in info.manifest.objects if item.path.startswith("rank-")}
    assert writers == {"00000", "00001"}
    # What both ranks hold is in it once: beside the tensors there is only the one value.
    data_bytes = sum(item.size for item in info.manifest.objects if item.path.startswith("rank-"))
    assert 0 < data_bytes - sum(tensor.nbytes for tensor in truth.values()) < 2000

    ranks.run("load_sharded", ranks=3, folder=tmp_path, run=run)
    for rank in range(3):
        (line,) = reports(tmp_path, rank)
        assert json.loads(line) == {"names": len(truth), "wrong": [], "moved": [], "count": 5, "from": 2}

    newest = find_checkpoints(run)[-1]
    assert (newest.step, newest.manifest.num_ranks) == (2, 3)
    state: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in truth.items()}
    state["count"] = None
    assert single(run).load(newest, state) == {"from": 3}
    assert state.pop("count") == 5
    assert all(torch.equal(state[name], tensor) for name, tensor in truth.items())
    read = read_checkpoint_tensors(run, newest, prefix="model.")
    assert set(read) == {name for name in truth if name.startswith("model.")}
    assert all(torch.equal(tensor, truth[name]) for name, tensor in read.items())


def test_an_object_damaged_for_one_rank_stops_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    ranks.run("save_sharded", ranks=2, folder=tmp_path, run=run)
    (info,) = find_checkpoints(run)
    damaged = max(item.path for item in info.manifest.objects if item.path.startswith("rank-00001"))
    content = bytearray(run.read(f"{info.path}/{damaged}"))
    content[0] ^= 1
    run.write(f"{info.path}/{damaged}", content)
    ranks.run("load_damaged", ranks=2, folder=tmp_path, run=run)
    for rank in (0, 1):
        (line,) = reports(tmp_path, rank)
        assert line.startswith("CheckpointError: ")
        assert f"{damaged} is damaged" in line


def test_a_rank_killed_inside_a_save_ends_the_others_and_commits_nothing(ranks: Ranks, tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    survivor, victim = ranks.start("lose_a_rank", ranks=2, folder=tmp_path, run=run)
    wait_until(lambda: "inside" in reports(tmp_path, 1) and reports(tmp_path, 0) == ["training goes on"])
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    assert ranks.reap(survivor) == 0
    assert time.monotonic() - started < 20
    assert reports(tmp_path, 0) == ["training goes on", "PeerLostError"]
    ranks.reap(victim)
    newest = single(run).newest()
    assert newest is not None
    assert newest.step == 1


def test_a_failure_on_one_rank_is_an_error_of_the_same_kind_on_all_and_the_next_save_works(
    ranks: Ranks, tmp_path: Path
) -> None:
    run = Storage(str(tmp_path / "run"))
    ranks.run("fail_on_one_rank", ranks=2, folder=tmp_path, run=run)
    for rank in (0, 1):
        assert reports(tmp_path, rank) == ["1 committed", "2 StorageError", "3 committed", "4 SupersededError"]
    assert [info.step for info in find_checkpoints(run)] == [1, 3]


def test_a_save_waits_out_an_object_store_that_is_away(
    object_store: ObjectStore, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Storage(f"s3://{bucket}/run")
    manager = single(run)
    state = {f"w{i}": torch.randn(1000, 1000) for i in range(10)}
    object_store.kill()
    try:
        ticket = manager.save(state, step=1, metadata={})
        time.sleep(3)
        assert not ticket.done
    finally:
        object_store.start()
    manager.wait()
    assert "does not answer" in caplog.text
    newest = manager.newest()
    assert newest is not None
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    manager.load(newest, target)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
