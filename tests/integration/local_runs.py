"""TrainingRuns on this machine: `osctl train --local` as a process of its own, started, watched and broken by tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import psutil
import yaml
from run_assertions import Object, ObservedRun, ranks_among, small_config, small_spec

from opensora.storage import Storage


class LocalRun(ObservedRun):
    """A run in a bucket, with its run file and what osctl says in a folder."""

    def __init__(self, name: str, *, run_uri: str, catalogue: str, folder: Path) -> None:
        super().__init__(name)
        self.storage = Storage(run_uri)
        self.folder = folder
        self.file = folder / f"{name}.yaml"
        self.catalogue = catalogue
        self._osctl: subprocess.Popen[str] | None = None

    def write_file(self, *overrides: str, **spec: Any) -> Path:
        """The run file: what `kubectl apply` takes, too."""
        config = small_config(self.catalogue)
        body = {"apiVersion": "opensora.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": self.name}}
        body["spec"] = small_spec(self.storage.uri, config, *overrides, **{"procsPerNode": 2, **spec})  # type: ignore[assignment]
        self.file.write_text(yaml.safe_dump(body))
        return self.file

    def create(self, *overrides: str, **spec: Any) -> Self:
        self.write_file(*overrides, **spec)
        return self.start()

    def start(self) -> Self:
        """Start what is in the run file, or go on with it."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(self.folder)}
        environment["XDG_CONFIG_HOME"] = str(self.folder)  # none of the settings of whoever runs the tests
        self._state.unlink(missing_ok=True)  # as osctl does, a moment later
        with open(self.folder / f"{self.name}.err", "a", encoding="utf-8") as err:
            self._osctl = subprocess.Popen(
                [sys.executable, "-m", "osctl", "train", str(self.file), "--local", "-o", "json"],
                env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, text=True,
            )  # fmt: skip
        return self

    @property
    def osctl(self) -> subprocess.Popen[str]:
        assert self._osctl is not None, f"{self.name} has not been started"
        return self._osctl

    @property
    def _state(self) -> Path:
        return self.folder / "osctl" / "runs" / self.name / "run.json"

    @property
    def status(self) -> Object:
        """As `osctl status --local` reads it."""
        try:
            content = json.loads(self._state.read_text())
        except FileNotFoundError:
            assert self.osctl.poll() is None, self.said()
            return {}
        status: Object = content["run"].get("status") or {}
        return status

    def processes(self) -> list[psutil.Process]:
        """All that osctl has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.osctl.pid).children(recursive=True)
        return []

    def ranks(self, *, attempt: int) -> dict[int, psutil.Process]:
        return ranks_among(self.processes(), self.name, attempt=attempt)

    def interrupt(self) -> None:
        """As Ctrl-C at a terminal."""
        self.osctl.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, Object]:
        """How osctl ends: its exit code, and what it printed."""
        out, _ = self.osctl.communicate(timeout=120)
        return self.osctl.returncode, json.loads(out) if out else {}

    def kill(self) -> None:
        """SIGKILL for osctl."""
        self.osctl.kill()
        self.osctl.wait()
        assert self.osctl.stdout is not None
        self.osctl.stdout.close()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._osctl is not None:
            self.kill()

    def said(self) -> str:
        """What osctl has printed for people."""
        return (self.folder / f"{self.name}.err").read_text()
