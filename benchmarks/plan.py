"""Time and memory to plan one epoch, and what the scalar rule of Open-Sora costs on the same rows.

    python benchmarks/plan.py [--rows 100000 1000000 10000000]

Each size runs in a process of its own: "plan" is `build_plan` with the third stage's bucket table, seed 0 and 64
micro-batches per step; "peak" is the process's largest resident size. "scalar" is `Bucket.get_bucket_id` row by row,
measured on 20 000 rows and extrapolated (Open-Sora runs it on every rank in every epoch). The goal is 5 s and 1 GiB
for a million rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from shapes import STAGE3, machine, synthetic_catalogue

from opensora.config.components import STDiT3Config
from opensora.config.train import LoopConfig
from opensora.datasets.bucket import Bucket
from opensora.datasets.cost import shape_costs
from opensora.datasets.plan import build_plan

SCALAR_ROWS = 20_000


def measure(num_rows: int) -> dict[str, float]:
    catalogue, bucket = synthetic_catalogue(num_rows), Bucket(STAGE3)
    costs = shape_costs(bucket.entries, STDiT3Config(type="STDiT3-XL/2"))
    before = _peak_mib()
    started = time.perf_counter()
    assigned = bucket.assign(catalogue.num_frames, catalogue.height, catalogue.width, catalogue.ids, seed=0, epoch=0)
    assign_seconds = time.perf_counter() - started
    started = time.perf_counter()
    plan = build_plan(
        catalogue, bucket, seed=0, epoch=0, micro_batches_per_step=64, costs=costs,
        balance_window=LoopConfig.balance_window, drop_last=True, shuffle=True, frame_interval=1,
    )  # fmt: skip
    plan_seconds = time.perf_counter() - started
    peak = _peak_mib()
    sample = min(num_rows, SCALAR_ROWS)
    columns = (getattr(catalogue, name)[:sample].tolist() for name in ("num_frames", "height", "width"))
    rows = list(zip(*columns, strict=True))
    started = time.perf_counter()
    scalar = [bucket.get_bucket_id(*shape, seed=row * len(bucket)) for row, shape in enumerate(rows)]
    scalar_seconds = (time.perf_counter() - started) / sample * num_rows
    names = [None if index < 0 else bucket.entries[index].name for index in assigned[:sample]]
    assert names == [None if found is None else "/".join(map(str, found)) for found in scalar], "the draws differ"
    return {
        "assign": assign_seconds, "plan": plan_seconds, "before": before, "peak": peak, "scalar": scalar_seconds,
        "micro_batches": plan.num_micro_batches, "unassigned": plan.num_unassigned, "left_over": plan.num_left_over,
    }  # fmt: skip


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    print(machine())
    print(
        f"\n{'rows':>9} {'assign s':>9} {'plan s':>7} {'µs/row':>7} {'before MiB':>11} {'peak MiB':>9} "
        f"{'scalar s':>9} {'ratio':>6} {'micro-batches':>14} {'no bucket':>10} {'left over':>10}"
    )
    for num_rows in arguments.rows:
        command = [sys.executable, __file__, "--measure", str(num_rows)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"{num_rows:9} {result['assign']:9.2f} {result['plan']:7.2f} {result['plan'] / num_rows * 1e6:7.2f} "
            f"{result['before']:11.0f} {result['peak']:9.0f} {result['scalar']:9.1f} "
            f"{result['scalar'] / result['assign']:6.0f} {result['micro_batches']:14} {result['unassigned']:10} "
            f"{result['left_over']:10}"
        )


if __name__ == "__main__":
    main()
