"""How long ranks wait for the slowest one of a step, by simulation: our plan and Open-Sora's random dealing.

    python benchmarks/imbalance.py [--rows 100000] [--window 64] [--epochs 3]

The idle share is 1 - sum(mean load of the ranks) / sum(highest load) over the steps of an epoch, with one micro-batch
per rank and step. The load of a micro-batch is its FLOPs on STDiT3-XL/2 with 300 text tokens, on the bucket table of
Open-Sora 1.2's third stage. The goal is 2 % at most.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from shapes import STAGE3, machine, synthetic_catalogue

from opensora.config.components import STDiT3Config
from opensora.config.train import LoopConfig
from opensora.datasets.bucket import Bucket
from opensora.datasets.cost import shape_costs
from opensora.datasets.plan import EpochPlan, build_plan, deal


def idle(loads: NDArray[np.float64]) -> float:
    """[steps, ranks] → share of the ranks' time that is waiting."""
    return 1 - loads.mean(axis=1).sum() / loads.max(axis=1).sum()


def planned_loads(plan: EpochPlan, num_ranks: int) -> NDArray[np.float64]:
    """Load of each rank in each step, as `deal` spreads them."""
    loads = np.zeros((plan.num_steps, num_ranks))
    for step in range(plan.num_steps):
        costs = [micro_batch.cost for micro_batch in plan.step(step)]
        for rank, share in enumerate(deal(costs, num_ranks)):
            loads[step, rank] = sum(costs[index] for index in share)
    return loads


def random_loads(plan: EpochPlan, num_ranks: int, *, seed: int) -> NDArray[np.float64]:
    """The same micro-batches as Open-Sora deals them: shuffled, then one after the other to the ranks; no rest."""
    costs = np.random.default_rng(seed).permutation(plan.costs)
    return costs[: len(costs) // num_ranks * num_ranks].reshape(-1, num_ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=LoopConfig.balance_window)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    catalogue, bucket = synthetic_catalogue(arguments.rows), Bucket(STAGE3)
    costs = shape_costs(bucket.entries, STDiT3Config(type="STDiT3-XL/2"))
    print(f"{machine()}\n{arguments.rows} rows, window {arguments.window}, epochs 0 to {arguments.epochs - 1}\n")
    print(f"{'ranks':>5} {'micro-batches':>14} {'steps':>6} {'idle, planned':>14} {'idle, random':>13} {'ratio':>6}")
    for num_ranks in (8, 32, 96):
        rows = []
        for epoch in range(arguments.epochs):
            plan = build_plan(
                catalogue, bucket, seed=0, epoch=epoch, micro_batches_per_step=num_ranks, costs=costs,
                balance_window=arguments.window, drop_last=True, shuffle=True, frame_interval=1,
            )  # fmt: skip
            rows.append((idle(planned_loads(plan, num_ranks)), idle(random_loads(plan, num_ranks, seed=epoch))))
        planned, random = np.mean(rows, axis=0)
        print(
            f"{num_ranks:5} {plan.num_micro_batches:14} {plan.num_steps:6} {planned:14.2%} {random:13.2%} "
            f"{random / planned:6.1f}"
        )


if __name__ == "__main__":
    main()
