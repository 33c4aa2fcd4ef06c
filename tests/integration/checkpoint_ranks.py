"""Processes for the checkpoint tests: a parent that imports torch once and forks the ranks of each scenario.

Reads one JSON command per line from standard input and answers each with one JSON line:
`{"scenario": NAME, "ranks": N, "folder": FOLDER, …}` starts N processes and answers with their ids; what a rank reports
goes, line by line, to `FOLDER/rank-R.txt`. `{"reap": PID}` waits for the end of one and answers with its exit code.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import opensora.s3  # noqa: F401  # before the fork, so that no rank spends time on it
from opensora.checkpoint import CheckpointManager, find_checkpoints, transfer
from opensora.config.train import CheckpointConfig
from opensora.errors import OpenSoraError
from opensora.records import announce_attempt
from opensora.storage import Data, Storage


class Rank:
    """What a scenario is given."""

    def __init__(self, number: int, command: dict[str, Any]) -> None:
        self.number = number
        self.size: int = command["ranks"]
        self.folder = Path(command["folder"])
        self.command = command
        self._report = os.open(self.folder / f"rank-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def report(self, line: str) -> None:
        os.write(self._report, f"{line}\n".encode())

    def join(self) -> dist.ProcessGroup:
        """The default group, and one for saving."""
        meeting = self.folder / f"meeting-{self.command['scenario']}-{self.size}"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=self.number, world_size=self.size)
        return dist.new_group(backend="gloo")

    def manager(self, run: Storage, group: dist.ProcessGroup | None, *, attempt: int = 1) -> CheckpointManager:
        config = CheckpointConfig(keep_last=2)
        return CheckpointManager(run, attempt=attempt, config=config, is_main=self.number == 0, process_group=group)


class HookedStorage(Storage):
    """Calls a hook before each write."""

    def __init__(self, uri: str, hook: Callable[[str], None]) -> None:
        super().__init__(uri)
        self.hook = hook

    def child(self, path: str) -> HookedStorage:
        return HookedStorage(self.uri_of(path), self.hook)

    def write(self, path: str, data: Data) -> None:
        self.hook(self.uri_of(path))
        super().write(path, data)


# Killed while saving.


def uniform_state(step: int) -> dict[str, Any]:
    """Every number in it is the step, so that a mixture of two states shows."""
    state: dict[str, Any] = {f"w{i}": torch.full((50, 100), float(step)) for i in range(6)}
    return {**state, "step": step}


def save_forever(rank: Rank) -> None:
    transfer.OBJECT_BYTES = 16 * 1024  # about ten objects for a state
    run = Storage(rank.command["run"])
    manager = rank.manager(run, None, attempt=rank.command["attempt"])
    newest = manager.newest()
    step = 0
    if newest is not None:
        state = uniform_state(-1)
        step = manager.load(newest, state)["step"]
    while True:
        step += 1
        rank.report(f"started {step}")
        manager.save(uniform_state(step), step=step, metadata={"step": step}, wait=True)
        rank.report(f"committed {step}")


# Sharded states.


class Uneven(nn.Module):
    """Shapes that 2 and 3 ranks do not divide, some with fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3, bias=False)
        self.gate = nn.Parameter(torch.randn(1, 4))
        self.scale = nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).sum() * self.scale.sum() + self.gate.square().sum()


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer, size: int) -> dict[str, Any]:
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state.update({f"optim.{name}.{key}": value for key, value in optimizer.state[parameter].items()})
    mesh = init_device_mesh("cpu", (size,))
    state["replicated"] = distribute_tensor(torch.arange(11.0), mesh, [Replicate()])
    state["plain"] = torch.arange(9).reshape(3, 3)
    return {**state, "count": 5}


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Uneven()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def whole(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def save_sharded(rank: Rank) -> None:
    group = rank.join()
    transfer.OBJECT_BYTES = 64  # also splits tensors
    state = sharded_state(*trained(seed=1), rank.size)
    rank.manager(Storage(rank.command["run"]), group).save(state, step=1, metadata={"from": rank.size}, wait=True)
    tensors = whole(state)
    if rank.number == 0:
        torch.save(tensors, rank.folder / "truth.pt")


def load_sharded(rank: Rank) -> None:
    """Load into another initialisation, compare with what was saved, save again."""
    group = rank.join()
    run = Storage(rank.command["run"])
    state = sharded_state(*trained(seed=2), rank.size)
    state["replicated"].to_local().zero_()
    state["plain"].zero_()
    state["count"] = None
    manager = rank.manager(run, group)
    (info,) = find_checkpoints(run)
    local = {name: value.to_local() for name, value in state.items() if isinstance(value, DTensor)}
    metadata = manager.load(info, state)
    truth = torch.load(rank.folder / "truth.pt")
    loaded = whole(state)
    wrong = [name for name, tensor in truth.items() if not torch.equal(loaded[name], tensor)]
    moved = [name for name, tensor in local.items() if tensor.data_ptr() != state[name].to_local().data_ptr()]
    rank.report(json.dumps({"names": len(truth), "wrong": wrong, "moved": moved, "count": state["count"], **metadata}))
    manager.save(state, step=2, metadata={"from": rank.size}, wait=True)


def load_damaged(rank: Rank) -> None:
    group = rank.join()
    run = Storage(rank.command["run"])
    state = sharded_state(*trained(seed=2), rank.size)
    (info,) = find_checkpoints(run)
    try:
        rank.manager(run, group).load(info, state)
    except OpenSoraError as error:
        rank.report(f"{type(error).__name__}: {error.message}")


# Failures of one rank.


def lose_a_rank(rank: Rank) -> None:
    """Rank 1 hangs inside its part of the second save, to be killed there; then a third save is tried."""
    group = rank.join()

    def hang(uri: str) -> None:
        if rank.number == 1 and "step-00000002" in uri:
            rank.report("inside")
            threading.Event().wait()

    manager = rank.manager(HookedStorage(rank.command["run"], hang), group)
    state = {
        "plain": torch.ones(10),
        "own": distribute_tensor(torch.ones(10, 2), init_device_mesh("cpu", (2,)), [Shard(0)]),
    }
    manager.save(state, step=1, metadata={}, wait=True)
    manager.save(state, step=2, metadata={})
    rank.report("training goes on")
    try:
        manager.save(state, step=3, metadata={})
    except OpenSoraError as error:
        rank.report(type(error).__name__)


def fail_on_one_rank(rank: Rank) -> None:
    group = rank.join()

    def fail(uri: str) -> None:
        if rank.number == 1 and "step-00000002" in uri:
            raise UnpicklableError(threading.Lock())

    run = HookedStorage(rank.command["run"], fail)
    manager = rank.manager(run, group)
    state = {"own": distribute_tensor(torch.ones(10, 2), init_device_mesh("cpu", (2,)), [Shard(0)])}
    for step in (1, 2, 3, 4):
        if step == 4 and rank.number == 0:
            announce_attempt(run, 2)
        try:
            manager.save(state, step=step, metadata={}, wait=True)
            rank.report(f"{step} committed")
        except OpenSoraError as error:
            rank.report(f"{step} {type(error).__name__}")


class UnpicklableError(Exception):
    """Like many errors of client libraries, it cannot travel to another process."""


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (save_forever, save_sharded, load_sharded, load_damaged, lose_a_rank, fail_on_one_rank)
}


def run_rank(number: int, command: dict[str, Any]) -> int:
    try:
        os.environ.update(command.get("environment", {}))
        SCENARIOS[command["scenario"]](Rank(number, command))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    for line in sys.stdin:
        command = json.loads(line)
        if "reap" in command:
            answer: object = os.waitstatus_to_exitcode(os.waitpid(command["reap"], 0)[1])
        else:
            pids = []
            for number in range(command["ranks"]):
                pid = os.fork()
                if pid == 0:
                    # Not sys.exit: the ends of gloo's and s3fs's threads are no part of these tests.
                    os._exit(run_rank(number, command))
                pids.append(pid)
            answer = pids
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
