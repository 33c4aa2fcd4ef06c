"""Measures how long a training loop is held up by a checkpoint that goes to an object store (SeaweedFS, loopback).

python benchmarks/checkpoint_save.py                  at least 500 MB of state, 5 saves of each kind
python benchmarks/checkpoint_save.py --megabytes 2000

Saves that return after the commit (`wait=True`) and saves that return after the copy alternate in one run, because
times drift. While the second kind is written, the loop computes, as training would.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from opensora.checkpoint import CheckpointManager, SaveTicket, find_checkpoints
from opensora.config.train import CheckpointConfig
from opensora.quickstart.object_store import ObjectStore
from opensora.storage import Storage

WIDTH = 384


def make_state(megabytes: int) -> dict[str, torch.Tensor]:
    """Weights, EMA and both moments of transformer blocks in fp32."""
    shapes = {"qkv": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH), "fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH)}
    state: dict[str, torch.Tensor] = {}
    block = 0
    while sum(tensor.nbytes for tensor in state.values()) < megabytes * 1e6:
        for kind in ("model", "ema", "optim.exp_avg", "optim.exp_avg_sq"):
            for name, shape in shapes.items():
                state[f"{kind}.blocks.{block}.{name}.weight"] = torch.randn(shape)
                state[f"{kind}.blocks.{block}.{name}.bias"] = torch.randn(shape[0])
        block += 1
    return state


class PeakMemory:
    """Highest resident size of this process while it is entered, in bytes."""

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self.peak = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, process.memory_info().rss)


def compute_until(ticket: SaveTicket) -> None:
    matrix = torch.randn(512, 512)
    while not ticket.done:
        matrix = torch.tanh(matrix @ matrix)


def measure(run: Storage, *, megabytes: int, repeats: int) -> None:
    config = CheckpointConfig(keep_last=1)
    manager = CheckpointManager(run, attempt=1, config=config, is_main=True, process_group=None)
    state = make_state(megabytes)
    size = sum(tensor.nbytes for tensor in state.values())
    times: dict[str, list[float]] = {"first": [], "synchronous": [], "in the loop": [], "in the background": []}
    process = psutil.Process()

    def save(kind: str, step: int, *, wait: bool) -> SaveTicket:
        started = time.perf_counter()
        ticket = manager.save(state, step=step, metadata={}, wait=wait)
        times[kind].append(time.perf_counter() - started)
        return ticket

    before = process.memory_info().rss
    with PeakMemory() as memory:
        save("first", 1, wait=False).wait()
    for step in range(2, 2 + 2 * repeats, 2):
        save("synchronous", step, wait=True)
        started = time.perf_counter()
        compute_until(save("in the loop", step + 1, wait=False))
        times["in the background"].append(time.perf_counter() - started)
    (info,) = find_checkpoints(run)

    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    started = time.perf_counter()
    manager.load(info, target)
    loading = time.perf_counter() - started
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())

    reference = statistics.median(times["synchronous"])
    print(
        f"{size / 1e6:.0f} MB in {len(state)} tensors, {len(info.manifest.objects)} objects; torch {torch.__version__}"
    )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads\n")
    print(f"{'':<42}{'median':>9}{'range':>18}{'of synchronous':>16}")
    labels = {
        "synchronous": "synchronous save",
        "in the loop": "inside save(), the rest in the background",
        "in the background": "until that save is committed",
        "first": "inside the first save() (allocates)",
    }
    for kind, label in labels.items():
        values = times[kind]
        middle = statistics.median(values)
        spread = f"{min(values):.3f}–{max(values):.3f} s"
        print(f"{label:<42}{middle:>7.3f} s{spread:>18}{middle / reference:>15.1%}")
    print(f"{'load, verified':<42}{loading:>7.3f} s")
    extra = (memory.peak - before - size) / 2**20
    print(
        f"\nmemory beside the state: its staging copy ({size / 2**20:.0f} MiB) and {extra:.0f} MiB while it is written"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time inside CheckpointManager.save against a synchronous save.")
    parser.add_argument("--megabytes", type=int, default=500, help="size of the state")
    parser.add_argument("--repeats", type=int, default=5, help="saves of each kind")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ObjectStore(Path(folder)) as store:
        os.environ.update(store.environment())
        store.create_bucket("benchmark")
        measure(Storage("s3://benchmark/run"), megabytes=arguments.megabytes, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
