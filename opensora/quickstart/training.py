"""Training for the quickstart: two ranks under the launcher, killed half-way once, then continued."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from opensora import records
from opensora.errors import ObjectNotFoundError, OpenSoraError
from opensora.processes import running
from opensora.storage import Storage

NUM_RANKS = 2
_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0
"""How long killed processes may take to end."""


class ProgramFailedError(OpenSoraError):
    """A program that the quickstart started has failed; it has said why."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"{command[1]} {command[2]} ended with exit code {code}", hint="see its messages above")
        self.exit_code = code  # type: ignore[assignment]  # whatever it was


def run_program(*arguments: str) -> None:
    """Run a module of ours until it ends.

    Raises:
        ProgramFailedError: it ended with another code than 0.
    """
    command = [sys.executable, "-m", *arguments]
    with running(command) as process:
        code = process.wait()
    if code != 0:
        raise ProgramFailedError(command, code)


def read_progress(run: Storage) -> dict[str, Any]:
    """The run's `progress.json`; empty before its first step."""
    try:
        progress = json.loads(run.read(records.PROGRESS_PATH))
    except ObjectNotFoundError:
        return {}
    return progress if isinstance(progress, dict) else {}


def is_finished(run: Storage, *, steps: int) -> bool:
    """Whether the run has done all its steps and saved the last one."""
    progress = read_progress(run)
    return progress.get("phase") == "done" and progress.get("step") == steps


def train(config: str, run: Storage, *, steps: int) -> None:
    """Train, or continue, until the last step.

    Raises:
        ProgramFailedError: training failed.
    """
    run_program(*_launch_arguments(config, run, steps=steps))


@dataclass(frozen=True)
class Kill:
    """What was killed, and when."""

    pids: list[int]
    """The launcher first, then its ranks."""
    step: int
    """The last step that the run had told of."""
    checkpoint_step: int
    """The newest step that was saved."""


def train_until_killed(config: str, run: Storage, *, steps: int) -> Kill | None:
    """Train, and kill the launcher with SIGKILL once half of the steps are done and a checkpoint is there.

    Returns:
        What was killed; None when training had ended before that.

    Raises:
        ProgramFailedError: training failed by itself.
    """
    command = [sys.executable, "-m", *_launch_arguments(config, run, steps=steps)]
    with running(command) as process:
        while process.poll() is None:
            progress = read_progress(run)
            if progress.get("step", 0) > steps // 2 and (progress.get("checkpoint_step") or 0) >= steps // 3:
                launcher = psutil.Process(process.pid)
                ranks = [one for one in launcher.children() if "opensora.train" in one.cmdline()]
                processes = [launcher, *ranks]
                process.kill()
                # The kernel ends the ranks with their launcher.
                psutil.wait_procs(processes, timeout=_STOP_SECONDS)
                return Kill([one.pid for one in processes], progress["step"], progress["checkpoint_step"])
            time.sleep(_POLL_SECONDS)
    if process.returncode != 0:
        raise ProgramFailedError(command, process.returncode)
    return None


def _launch_arguments(config: str, run: Storage, *, steps: int) -> list[str]:
    return [
        "opensora.launch", "--nproc-per-node", str(NUM_RANKS), "--run-uri", run.uri,
        "opensora.train", config, f"run_uri={run.uri}", f"train.steps={steps}",
        f"checkpoint.every_steps={max(steps // 6, 1)}",
    ]  # fmt: skip
