"""What a TrainingRun promises wherever it runs: on a cluster, and on one machine with `osctl train --local`.

One run that nothing disturbs is the truth. Whatever happens to the others, they end with its loss curve.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import psutil
import yaml
from training_runs import CONFIG

from opensora.checkpoint.manifest import scan_checkpoints
from opensora.errors import ExitCode, ObjectNotFoundError
from opensora.quickstart.training import read_progress
from opensora.storage import Storage

Object = dict[str, Any]
STEPS = 24
SAVE_EVERY = 4
RANKS = 4
END_SECONDS = 400.0
"""For a run, or an attempt of it, to come to its end; a tenth of that on an idle machine."""
HASTY_WATCHDOG = {"minSeconds": 15, "stepTimeoutFactor": 4, "heartbeatSeconds": 5}


def small_config(catalogue: str) -> Object:
    """The config of all these runs."""
    config = copy.deepcopy(CONFIG)
    del config["checkpoint"]  # the spec says it
    config["data"] = {"path": catalogue, "bucket_config": {"144p": {"17": [1.0, 2]}}, "repeats": 8}
    train: Any = config["train"]
    train |= {"steps": STEPS, "log_every": 1}
    return config


def small_spec(run_uri: str, config: Object, /, *overrides: str, **spec: Any) -> Object:
    """The spec of all these runs: two nodes. `overrides` are those of the config; `spec` adds to the spec."""
    return {
        "runUri": run_uri,
        "config": {"inline": yaml.safe_dump(config), "overrides": list(overrides)},
        "nodes": 2,
        "checkpoint": {"everySteps": SAVE_EVERY},
        "restartPolicy": {"backoff": {"baseSeconds": 0, "maxSeconds": 0}, "noProgressAttempts": 10},
        "deadlines": {"stuckPodSeconds": 10},
        "watchdog": {"heartbeatSeconds": 5},
        "terminationGracePeriodSeconds": 30,
        **spec,
    }


# ------------------------------------------------------------------------------------------------------- what is seen


class Observed(ABC):
    """An object of one of our kinds, whoever keeps it."""

    transient: ClassVar[tuple[type[Exception], ...]] = (OSError, KeyError)
    """Errors of a look that the next one may not have."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def status(self) -> Object:
        """As it is now; empty before there is one."""

    def condition(self, kind: str) -> Object:
        return next((found for found in self.status.get("conditions", ()) if found["type"] == kind), {})

    def until(self, check: Callable[[], Any], *, what: str, seconds: float = END_SECONDS) -> Any:
        """Wait until a check gives something true, and return it. What is over does nothing any more."""

        def check_or_end() -> Any:
            if found := check():
                return found
            phase = self.status.get("phase")
            if phase in ("Succeeded", "Failed") and not (found := check()):
                raise AssertionError(f"{self.name} is {phase}, and waited for: {what}")
            return found

        return wait_until(check_or_end, seconds=seconds, what=f"{self.name}: {what}", transient=self.transient)

    def until_phase(self, phase: str, *, seconds: float = END_SECONDS) -> Object:
        """Wait for a phase, and return the status."""

        def check() -> Object | None:
            status = self.status
            return status if status.get("phase") == phase else None

        found: Object = self.until(check, what=f"phase {phase}", seconds=seconds)
        return found


class ObservedRun(Observed):
    """A TrainingRun of two nodes with two ranks each, unless its spec says otherwise."""

    storage: Storage

    @abstractmethod
    def create(self, *overrides: str, **spec: Any) -> Self:
        """Start it, with these overrides of the config and additions to the spec."""

    @abstractmethod
    def ranks(self, *, attempt: int) -> dict[int, psutil.Process]:
        """The processes of an attempt by their rank."""

    def losses(self) -> dict[int, float]:
        """Step → loss; of a step that was done twice, the later one."""
        return {step: loss for _, step, loss in self._written()}

    def steps(self) -> dict[int, list[int]]:
        """Attempt → the steps that it has done."""
        found: dict[int, list[int]] = {}
        for attempt, step, _ in self._written():
            found.setdefault(attempt, []).append(step)
        return found

    def saved_step(self, *, attempt: int) -> int:
        """The step of the newest complete checkpoint of an attempt."""
        return max(info.step for info in scan_checkpoints(self.storage).complete if info.attempt == attempt)

    def _written(self) -> list[tuple[int, int, float]]:
        """(attempt, step, loss) as the run directory has them."""
        found = []
        for path in (info.path for info in self.storage.list("metrics") if info.path.endswith(".jsonl")):
            attempt = int(path.split("/")[1].removeprefix("attempt-"))
            records = [json.loads(line) for line in self.storage.read(path).splitlines()]
            found += [(attempt, record["step"], record["loss"]) for record in records if "loss" in record]
        return sorted(found)

    def until_step(self, step: int, *, attempt: int) -> int:
        """Wait until an attempt has done a step, and return the one that it has got to.

        The run directory tells sooner than the status, which is written every ten seconds.
        """

        def check() -> int:
            try:
                self.storage.read(f"attempts/{attempt}/started.json")
            except ObjectNotFoundError:
                return 0
            progress = read_progress(self.storage)
            done = progress.get("step", 0) if progress.get("attempt") == attempt else 0
            return done if done >= step else 0

        found: int = self.until(check, what=f"step {step} of attempt {attempt}")
        return found

    def until_attempt_ended(self, attempt: int, *, seconds: float = END_SECONDS) -> Object:
        """Wait until an attempt is closed, and return its record."""

        def check() -> Object | None:
            records = self.status.get("attempts", ())
            return next((one for one in records if one["number"] == attempt and one.get("endedAt")), None)

        found: Object = self.until(check, what=f"end of attempt {attempt}", seconds=seconds)
        return found


def wait_until(
    check: Callable[[], Any], *, seconds: float, what: str, transient: tuple[type[Exception], ...] = ()
) -> Any:
    """Wait until a check gives something true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        problem: Exception | None = None
        try:
            found = check()
        except transient as error:
            found, problem = None, error
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what} {problem or ''}"
        time.sleep(0.2)


def ranks_among(processes: Iterable[psutil.Process], run: str, *, attempt: int) -> dict[int, psutil.Process]:
    """Those of some processes that are ranks of a run's attempt, by their rank."""
    found = {}
    for process in processes:
        variables, parent = _environment(process), _environment(process.parent())
        is_ours = variables.get("OPENSORA_RUN_URI", "").endswith(f"/{run}")
        if is_ours and variables.get("OPENSORA_ATTEMPT") == str(attempt) and "RANK" in variables.keys() - parent:
            found[int(variables["RANK"])] = process
    return found


def _environment(process: psutil.Process | None) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return {} if process is None else process.environ()
    return {}


# --------------------------------------------------------------------------------------------------- what is promised


def assert_undisturbed(run: ObservedRun) -> dict[int, float]:
    """The run has ended well in its first attempt. Returns its losses by step."""
    status = run.until_phase("Succeeded")
    assert (status["attempt"], status.get("restarts", 0), status.get("disruptions", 0)) == (1, 0, 0)
    assert (status["progress"]["step"], status["progress"]["percent"]) == (STEPS, 100)
    assert status["resolved"]["worldSize"] == RANKS
    assert [record["cause"] for record in status["attempts"]] == ["AllRanksSucceeded"]
    losses = run.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


def assert_ends_like(run: ObservedRun, losses: dict[int, float]) -> Object:
    """The run ends well, with the losses of the one that nothing happened to. Returns its status."""
    status = run.until_phase("Succeeded")
    assert run.losses() == losses
    return status


def assert_crash_is_told(
    run: ObservedRun, *, attempt: int, rank: int, after_step: int, meanwhile: Callable[[], None] = lambda: None
) -> Object:
    """A rank that is killed ends its attempt, whose record names it. Returns the record."""
    run.until_step(after_step, attempt=attempt)
    run.ranks(attempt=attempt)[rank].kill()
    meanwhile()
    record = run.until_attempt_ended(attempt)
    assert (record["cause"], record["rank"], record["exitCode"]) == ("WorkerFailed", rank, ExitCode.FAILED)
    assert "SIGKILL" in record["message"]
    return record


def assert_hang_is_told(run: ObservedRun, *, attempt: int, rank: int, after_step: int) -> Object:
    """A rank that stands still is found by the others, whose watchdog ends the attempt. Returns the record."""
    begun = run.until_step(after_step, attempt=attempt)
    run.until_step(begun + 2, attempt=attempt)  # before its first step an attempt is given ten minutes
    run.ranks(attempt=attempt)[rank].suspend()
    record = run.until_attempt_ended(attempt)
    assert (record["cause"], record["exitCode"]) == ("Hang", ExitCode.STALLED)
    return record


def assert_wrong_config_is_not_tried_again(run: ObservedRun) -> Object:
    """A run with `model.type=STDiT9` fails at once, and says what is wrong. Returns its status."""
    status = run.until_phase("Failed")
    assert (status["attempt"], status.get("restarts", 0)) == (1, 0)
    assert status["attempts"][0]["exitCode"] == ExitCode.CONFIG
    failed = run.condition("Failed")
    assert failed["reason"] == "NonRetryableExit"
    assert "model" in failed["message"]
    assert "STDiT9" in failed["message"]
    return status


def assert_no_step_was_done_twice(run: ObservedRun, borders: list[int]) -> None:
    """Each attempt has gone on where the one before it had saved: attempt n did `borders[n-1]` + 1 to `borders[n]`."""
    wanted = {number: list(range(borders[number - 1] + 1, borders[number] + 1)) for number in range(1, len(borders))}
    assert run.steps() == wanted
