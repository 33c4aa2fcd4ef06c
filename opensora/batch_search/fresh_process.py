"""Measurements in processes of their own: what one batch leaves behind, or breaks, reaches no other."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from opensora.batch_search.probe import ProbeRequest, ProbeResult
from opensora.cgroups import OomKills
from opensora.config.load import dump_config
from opensora.config.search import SearchConfig
from opensora.config.train import TrainConfig
from opensora.errors import ExitCode, StopRequestedError
from opensora.processes import running
from opensora.records import Verdict

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class OutOfMemory:
    """The batch did not fit: an allocation failed, or the kernel killed a process for memory."""

    message: str


@dataclass(frozen=True)
class Failure:
    """The measurement failed for another reason, which says nothing about the batch."""

    code: int
    """Exit code, see `opensora.errors.ExitCode`."""
    message: str


Outcome = ProbeResult | OutOfMemory | Failure


class FreshProcesses:
    """Measures batches of a training, each under a launcher of its own.

    The launcher finds out how a rank ended, the OOM killer included, and says it in its verdict.
    """

    def __init__(self, config: TrainConfig, settings: SearchConfig, *, folder: Path) -> None:
        """Nothing is started yet.

        Args:
            config: the training.
            settings: how it is measured.
            folder: for scratch files; the caller removes it.
        """
        self._config_text = dump_config(config)
        self._settings = settings
        self._folder = folder
        self._has_bytecode = False

    def __call__(self, bucket: str, batch_size: int) -> Outcome:
        """Measure one batch size; 0 is the empty batch.

        Raises:
            StopRequestedError: the processes were asked to stop.
        """
        if not self._has_bytecode:
            self._compile()
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as name:
            scratch = Path(name)
            request = ProbeRequest(
                config=self._config_text,
                bucket=bucket,
                batch_size=batch_size,
                untimed_steps=self._settings.untimed_steps,
                timed_steps=self._settings.timed_steps,
            )
            (scratch / "request.json").write_text(json.dumps(asdict(request)))
            status, oom_killed = self._run(scratch)
            return outcome_of(scratch, status, oom_killed=oom_killed)

    def _compile(self) -> None:
        """Have Python compile the modules that a measurement loads: it takes memory, and nothing should measure that.

        What this process may not leave beside the modules (PYTHONDONTWRITEBYTECODE) goes to the scratch folder; to
        compile torch for every measurement takes longer than the steps.
        """
        command = [sys.executable, "-c", "import opensora.batch_search.probe as probe; probe.load_modules()"]
        with running(command, env=self._environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            process.wait()  # if it fails, the first measurement says why
        self._has_bytecode = True

    def _environment(self) -> dict[str, str]:
        # What tells a launcher about a run does not hold for these processes.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENSORA_")}
        if environment.pop("PYTHONDONTWRITEBYTECODE", None) is not None:
            environment["PYTHONPYCACHEPREFIX"] = str(self._folder / "bytecode")
        return environment

    def _run(self, scratch: Path) -> tuple[int | None, bool]:
        """Exit status of the launcher, None where it took too long; and whether it was itself killed for memory."""
        command = [
            sys.executable, "-m", "opensora.launch", "--nproc-per-node", str(self._settings.nproc_per_node),
            "opensora.batch_search.probe", str(scratch / "request.json"),
        ]  # fmt: skip
        environment = self._environment() | {
            "OPENSORA_TERMINATION_LOG": str(scratch / "verdict.json"),
            "TMPDIR": str(scratch),
        }
        deadline = time.monotonic() + self._settings.probe_timeout_seconds
        kills = OomKills()
        with (
            open(scratch / "output.txt", "wb") as output,
            running(command, env=environment, stdout=output, stderr=output) as process,
        ):
            while True:
                kills.watch(process.pid)
                try:
                    status = process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    if time.monotonic() > deadline:
                        return None, False
                else:
                    return status, status == -signal.SIGKILL and kills.killed(process.pid)


def outcome_of(scratch: Path, status: int | None, *, oom_killed: bool) -> Outcome:
    """What the processes of a measurement have left behind.

    Args:
        scratch: their folder, with the launcher's verdict.
        status: exit status of the launcher; None where it took too long.
        oom_killed: whether the kernel killed it for memory.

    Raises:
        StopRequestedError: they were asked to stop.
    """
    if status is None:
        return Failure(ExitCode.STALLED, "the measurement took longer than probe_timeout_seconds allows")
    if oom_killed:
        return OutOfMemory("the kernel killed the launcher for memory")
    try:
        verdict = Verdict.from_json((scratch / "verdict.json").read_bytes())
    except (OSError, ValueError):
        words = (scratch / "output.txt").read_text(errors="replace").strip().splitlines()
        return Failure(ExitCode.FAILED, f"the launcher ended with {status}: {words[-1] if words else 'no output'}")
    if verdict.code == ExitCode.DONE:
        return ProbeResult(**json.loads((scratch / "result.json").read_bytes()))
    if verdict.code == ExitCode.OUT_OF_MEMORY:
        return OutOfMemory(verdict.message)
    if verdict.code in (ExitCode.STOPPED, ExitCode.INTERRUPTED):
        raise StopRequestedError("a measurement was stopped", hint="the same command continues the search")
    if verdict.first is not None:
        logger.error("%s", "\n".join(verdict.first.last_words))
    return Failure(verdict.code, verdict.message)
