"""A training process and the operator's progress server, on two ends of a real TLS connection."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from progress_channel import NAMESPACE, POD, RUN, Operator, live_run
from training_runs import STEPS, Run, assert_equal_within, environment

from opensora.storage import Storage

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

LONG = ("train.steps=100000", "checkpoint.every_steps=0")
"""Ends when it is told to."""


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    with Operator(tmp_path).running() as running:
        yield running


@pytest.fixture
def run(catalogue: Path, tmp_path: Path) -> Run:
    return Run(tmp_path / "run", catalogue)


@pytest.fixture
def start(operator: Operator) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command in the pod's environment; a test that fails leaves none running."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], **environ: str) -> subprocess.Popen[str]:
        variables = {**environment(), **operator.environment, **environ}
        process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def said_at_the_end(process: subprocess.Popen[str], *, code: int) -> str:
    said = process.communicate(timeout=100)[1]
    assert process.returncode == code, said
    return said


def test_reports_arrive_and_change_nothing(
    operator: Operator, run: Run, one_rank: Run, catalogue: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    more = [
        f"validation.path={catalogue}", "validation.every_steps=6", "validation.max_batches=2",
        "samples.every_steps=6", "samples.prompts=[a clip]", "samples.num_sampling_steps=150",
    ]  # fmt: skip
    said_at_the_end(start(run.command(2, *more)), code=0)
    assert_equal_within(run, one_rank, 1e-9)
    last = operator.reports[-1]
    assert (last.phase, last.state, last.step, last.total_steps) == ("done", "Stopping", STEPS, STEPS)
    assert (last.checkpoint_step, last.samples_step, last.attempt) == (STEPS, STEPS, 1)
    assert last.loss == pytest.approx(one_rank.losses()[STEPS], rel=1e-9)
    assert last.samples_per_second is not None
    assert last.samples_per_second > 0
    states = [report.state for report in operator.reports]
    assert states[0] in ("Starting", "Training"), "the first report may take until the first step"
    assert "Training" in states
    assert {"Evaluating", "Sampling"} & set(states), "longer phases are seen"
    steps = [report.step for report in operator.reports]
    assert steps == sorted(steps)
    gaps = [later - earlier for earlier, later in itertools.pairwise(operator.times)]
    assert min(gaps[:-1], default=1) > 0.9, "at most one a second, but for the last"


def test_what_the_reply_asks_for_is_done_by_all_ranks(
    operator: Operator, run: Run, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(run.command(2, *LONG))
    wait_until(lambda: operator.reports and operator.reports[-1].step > 0, process)

    operator.ask(checkpoint={"id": "before-lunch"})
    wait_until(lambda: operator.reports[-1].requests.get("checkpoint"), process)
    done = operator.reports[-1]
    assert done.requests == {"checkpoint": "before-lunch"}
    assert run.saved_steps() == [done.checkpoint_step]
    wait_until(lambda: operator.reports[-1].step > done.step + 3, process)
    assert len(run.saved_steps()) == 1, "the same id asks once"
    operator.ask(checkpoint={"id": "after-lunch"})
    wait_until(lambda: operator.reports[-1].requests.get("checkpoint") == "after-lunch", process)
    assert len(run.saved_steps()) == 2

    operator.ask(dump={"id": "curious"})
    wait_until(lambda: operator.reports[-1].requests.get("dump") == "curious", process)
    for rank in range(2):
        stacks = (run.folder / f"dumps/attempt-1/curious/rank-{rank}.txt").read_text()
        assert stacks.startswith("curious: in ")
        assert "thread MainThread" in stacks
        assert "trainer.py" in stacks

    operator.ask(stop=True)
    said = said_at_the_end(process, code=75)
    last = operator.reports[-1]
    assert (last.phase, last.state) == ("stopped", "Stopping")
    assert run.saved_steps()[-1] == last.step == last.checkpoint_step
    assert f"stopped after step {last.step}; the same command continues" in said
    assert run.verdict(1).codes == {"0": 75, "1": 75}

    # The next attempt continues from there; as the operator would, the request is taken back.
    operator.directory.runs[NAMESPACE, RUN] = live_run(attempt=2)
    said_at_the_end(start(run.command(1, f"train.steps={last.step + 2}")), code=0)
    assert operator.reports[-1].step == last.step + 2
    assert operator.reports[-1].attempt == 2


def test_stacks_of_ranks_that_stand_still_are_written(
    operator: Operator, run: Run, start: Callable[..., subprocess.Popen[str]]
) -> None:
    program = str(Path(__file__).with_name("drill_ranks.py"))
    process = start(run.command(2, *LONG, program=program), OPENSORA_DRILL="hang,encode,9,1")

    def stands_still() -> bool:
        last = [report.step for report in operator.reports[-8:]]
        return len(last) == 8 and len(set(last)) == 1 and last[0] > 0

    wait_until(stands_still, process, seconds=120)
    operator.ask(dump={"id": "stalled"})
    wait_until(lambda: operator.reports[-1].requests.get("dump") == "stalled", process)
    stacks = [(run.folder / f"dumps/attempt-1/stalled/rank-{rank}.txt").read_text() for rank in range(2)]
    assert "stand_still_for_ever" in stacks[1]
    assert "stand_still_for_ever" not in stacks[0]
    assert "all_reduce" in stacks[0] or "distributed_c10d" in stacks[0]
    now, then = operator.reports[-1], operator.reports[-3]
    assert now.step == then.step
    assert now.advanced == then.advanced < then.received < now.received, "that it is alive is reported, and no more"


def test_an_operator_that_is_away_costs_no_time(
    operator: Operator, run: Run, one_rank: Run, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(run.command(1, *LONG))
    wait_until(lambda: operator.reports and operator.reports[-1].step > 3, process)

    def pace() -> float:
        """Seconds per step over a while."""
        metrics = run.folder / "metrics/attempt-1"
        time.sleep(1.5)  # what was written until now
        begin = len(run.losses())
        time.sleep(5)
        assert metrics.exists()
        return 5 / max(1, len(run.losses()) - begin)

    with_operator = pace()
    operator.stop()
    without = pace()
    assert without < 1.5 * with_operator + 0.05
    known = len(operator.reports)
    operator.start()
    wait_until(lambda: len(operator.reports) > known, process, seconds=20)
    operator.leads = False
    known = len(operator.reports)
    operator.ask(stop=True)
    time.sleep(2.5)
    assert len(operator.reports) == known, "a replica that does not lead takes nothing"
    operator.leads = True
    said = said_at_the_end(process, code=75)
    assert said.count("progress does not reach the operator") == 2
    assert operator.reports[-1].phase == "stopped"


def test_an_end_without_an_operator_is_not_held_up(
    operator: Operator, run: Run, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(run.command(1, *LONG))
    wait_until(lambda: operator.reports and operator.reports[-1].step > 0, process)
    operator.stop()
    begin = time.monotonic()
    process.terminate()
    said_at_the_end(process, code=75)
    assert time.monotonic() - begin < 12
    assert Storage(str(run.folder)).exists("progress.json")


def test_a_token_that_was_renewed_is_taken_up(
    operator: Operator, run: Run, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start(run.command(1, *LONG))
    wait_until(lambda: operator.reports, process)
    operator.cluster.tokens.clear()  # the old one is over
    (tmp_path / "token").write_text(operator.cluster.make_token(pod=POD))
    known = len(operator.reports)
    wait_until(lambda: len(operator.reports) > known, process)
    operator.directory.runs[NAMESPACE, RUN] = replace(live_run(), requests={"stop": True})
    said_at_the_end(process, code=75)


STOPPED_AND_ASKED = """
import os, signal, sys, time
from opensora.training.control import StopControl
from opensora.training.position import Position

control = StopControl(Position(0))
control.install()
control.ask()
control.ask()
assert control.requested
time.sleep(0.3)  # before the loop it waits for it
control.start_loop(deadline_seconds=float(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
time.sleep(0.5)
print("saved")
"""


@pytest.mark.parametrize(
    ("deadline", "num_signals", "told"),
    [
        (60, 0, "saved"),
        (60, 1, "saved"),
        (60, 2, "SIGTERM in start-up: a second signal came; the last complete checkpoint is untouched"),
        (0.1, 0, "the operator's request in start-up: not saved within 0.1 s; the last complete checkpoint"),
    ],
    ids=["asked", "asked and SIGTERM", "asked and two SIGTERMs", "too slow"],
)
def test_the_operators_request_leaves_the_time_that_one_signal_leaves(
    deadline: float, num_signals: int, told: str
) -> None:
    arguments = [sys.executable, "-c", STOPPED_AND_ASKED, str(deadline), str(num_signals)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert told in done.stdout + done.stderr
    assert done.returncode == (0 if told == "saved" else 75)
