"""Hybrid sharding: groups of ranks that each hold all shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_here import config_of, train_here
from training_runs import Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SETTINGS = ("train.steps=3", "checkpoint.every_steps=0", "optim.ema_decay=null")


def gradient_norms(run: Run) -> list[float]:
    lines = [json.loads(line) for line in (run.folder / "metrics/attempt-1/part-00000.jsonl").read_text().splitlines()]
    return [line["grad_norm"] for line in lines]


def test_two_replicas_of_two_shards_compute_what_one_rank_does(catalogue: Path, tmp_path: Path) -> None:
    alone, hybrid = (Run(tmp_path / name, catalogue) for name in ("alone", "hybrid"))
    train_here(config_of(alone, *SETTINGS))
    hybrid.train(4, *SETTINGS, "parallel.replicas=2")
    assert gradient_norms(hybrid) == pytest.approx(gradient_norms(alone), rel=1e-10)
    assert hybrid.losses() == pytest.approx(alone.losses(), rel=1e-10)
    theirs = alone.weights()
    for name, tensor in hybrid.weights().items():
        difference = float((tensor - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-30))
        assert difference <= 1e-10, f"{name} differs by {difference:.1e}"
