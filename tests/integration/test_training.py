"""Whole runs through the launcher, on real ranks: exact on any number of them, exact after a kill."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from training_runs import STEPS, Run, assert_equal_within, environment

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def two_ranks(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("two") / "run", catalogue)
    run.train(2)
    return run


def test_the_weights_do_change(one_rank: Run) -> None:
    losses = one_rank.losses()
    assert len(set(losses.values())) == STEPS
    assert losses[STEPS] < losses[1]


def test_two_ranks_compute_what_one_does(one_rank: Run, two_ranks: Run) -> None:
    assert_equal_within(two_ranks, one_rank, 1e-10)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (3, ("parallel.sharding=zero2",)),
        (3, ("parallel.sharding=zero3", "parallel.activation_checkpointing=full")),
    ],
    ids=["zero2-uneven", "zero3-uneven-checkpointed"],
)
def test_three_ranks_with_uneven_work_compute_what_one_does(
    one_rank: Run, catalogue: Path, tmp_path: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    run = Run(tmp_path / "run", catalogue)
    run.train(ranks, *overrides)
    assert_equal_within(run, one_rank, 1e-10)


def test_a_killed_run_resumes_bit_for_bit(two_ranks: Run, catalogue: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", catalogue)
    run.train_and_kill(2, after_step=5)
    assert not (run.folder / "export").exists()
    done = run.train(2)
    assert "attempt 2 continues from the checkpoint of step 5" in done.stderr
    assert {step: run.losses()[step] for step in range(6, STEPS + 1)} == {
        step: two_ranks.losses()[step] for step in range(6, STEPS + 1)
    }
    theirs = two_ranks.weights()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in run.weights().items())


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 1)])
def test_a_killed_run_resumes_on_another_number_of_ranks(
    one_rank: Run, catalogue: Path, tmp_path: Path, first: int, second: int
) -> None:
    run = Run(tmp_path / "run", catalogue)
    run.train_and_kill(first, after_step=5)
    run.train(second)
    assert_equal_within(run, one_rank, 1e-10, from_step=6)


def test_fp32_agrees_to_its_precision(catalogue: Path, tmp_path: Path) -> None:
    runs = [Run(tmp_path / f"run-{ranks}", catalogue, ["dtype=fp32"]) for ranks in (1, 3)]
    runs[0].train(1)
    runs[1].train(3)
    ours, theirs = runs[1].losses(), runs[0].losses()
    assert [ours[step] for step in range(1, STEPS + 1)] == pytest.approx(
        [theirs[step] for step in range(1, STEPS + 1)], rel=1e-5
    )
    # Over all weights together: the bias of attention's keys has no true gradient (softmax ignores a shift), and AdamW
    # turns its rounding errors into steps.
    mine, other = (torch.cat([tensor.flatten() for tensor in run.weights().values()]) for run in runs)
    assert float((mine - other).norm() / other.norm()) <= 1e-5


def test_another_order_of_samples_cannot_continue_a_run(one_rank: Run) -> None:
    done = one_rank.train(1, "seed=8", expect=78)
    assert "begun with another seed (7, now 8)" in done.stderr


def test_sigterm_finishes_the_step_saves_and_exits_75(one_rank: Run, catalogue: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", catalogue)
    process = subprocess.Popen(run.command(2), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(run.folder.glob("checkpoints/step-00000005/*/manifest.json")):
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 75
    saved = max(int(path.parent.parent.name[5:]) for path in run.folder.glob("checkpoints/*/*/manifest.json"))
    assert saved >= 5
    done = run.train(2)
    assert f"continues from the checkpoint of step {saved}" in done.stderr
    assert_equal_within(run, one_rank, 1e-10)


def test_a_diverged_run_ends_with_87_and_names_step_bucket_and_rows(catalogue: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", catalogue)
    settings = ("dtype=fp32", "optim.lr=1e30", "optim.grad_clip=0", "optim.warmup_steps=0")
    done = run.train(2, *settings, expect=87)
    assert "bucket 144p/17/" in done.stderr
    assert "rows [" in done.stderr
