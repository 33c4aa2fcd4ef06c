"""What is seen of a run while it goes on: `progress.json`, a copy of it pushed to a URL, a bar on a terminal."""

from __future__ import annotations

import http.client
import json
import logging
import os
import sys
import threading
import urllib.request
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from opensora import records
from opensora.errors import StorageError
from opensora.storage import Storage
from opensora.training.operator_link import OperatorLink

logger = logging.getLogger(__name__)

_WRITE_INTERVAL_SECONDS = 1.0
_PUSH_TIMEOUT_SECONDS = 5.0
_LAST_REPORT_SECONDS = 5.0
"""How long the end of a run may be held up by an operator that does not answer."""

State = Literal["Starting", "Training", "Evaluating", "Saving", "Sampling", "Stopping"]
"""What the ranks do at the moment."""


@dataclass(frozen=True, kw_only=True)
class ProgressState:
    """The content of `progress.json`."""

    phase: str
    """"training", or how the attempt ended: "done", "stopped", "failed"."""
    state: State
    """`Starting` until the first step of the attempt is done; `Stopping` also at the end."""
    step: int
    """Optimiser steps done."""
    total_steps: int | None
    epoch: int
    loss: float | None
    seconds_per_step: float | None
    """Mean of the last steps."""
    samples_per_second: float | None
    """Clips trained on, over the last steps."""
    eta_seconds: float | None
    goodput: float
    attempt: int
    checkpoint_step: int | None
    """Newest step that was saved completely."""
    samples_step: int | None
    """Newest step whose round of samples is complete, of this attempt."""
    updated: float
    """Unix time in seconds."""


class ProgressReporter:
    """Shows the state of a run; rank 0 alone has one. Writing happens beside the loop and never delays it."""

    def __init__(
        self,
        run: Storage,
        *,
        total_steps: int | None,
        first_step: int,
        url: str | None = None,
        operator: OperatorLink | None = None,
    ) -> None:
        self._run = run
        self._url = url
        self._operator = operator
        self._latest: ProgressState | None = None
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._bar, self._task = _make_bar(total_steps, first_step)
        self._thread = threading.Thread(target=self._write_latest, name="progress", daemon=True)
        self._thread.start()

    @property
    def has_bar(self) -> bool:
        return self._bar is not None

    def update(self, state: ProgressState) -> None:
        self._latest = state
        self._changed.set()
        if self._operator is not None:
            self._operator.update(state)
        if self._bar is not None and self._task is not None:
            loss = "" if state.loss is None else f"loss {state.loss:.4f}"
            pace = "" if state.seconds_per_step is None else f"{state.seconds_per_step:.3g} s/step"
            self._bar.update(self._task, completed=state.step, loss=loss, pace=pace)

    def close(self, state: ProgressState, *, timeout_seconds: float = 15.0) -> None:
        """Write the last state, waiting a bounded time for it."""
        self.update(state)
        self._closing.set()
        self._changed.set()
        if self._operator is not None:
            self._operator.close(state, timeout_seconds=min(timeout_seconds, _LAST_REPORT_SECONDS))
        self._thread.join(timeout_seconds)
        if self._operator is not None:
            self._operator.join()
        if self._bar is not None:
            self._bar.stop()

    def _write_latest(self) -> None:
        reachable = dict.fromkeys((records.PROGRESS_PATH, self._url), True)
        while True:
            self._changed.wait()
            self._changed.clear()
            state, closing = self._latest, self._closing.is_set()
            if state is not None:
                content = json.dumps(asdict(state), indent=1).encode()
                for target, send in ((records.PROGRESS_PATH, self._write), (self._url, self._push)):
                    try:
                        send(content)
                    except (StorageError, OSError, http.client.HTTPException) as error:
                        if reachable[target]:
                            said = error.message if isinstance(error, StorageError) else error
                            logger.warning("progress does not reach %s: %s; training goes on", target, said)
                        reachable[target] = False
                    else:
                        reachable[target] = True
            if closing and state is self._latest:
                return
            self._closing.wait(_WRITE_INTERVAL_SECONDS)

    def _write(self, content: bytes) -> None:
        self._run.write(records.PROGRESS_PATH, content)

    def _push(self, content: bytes) -> None:
        if self._url is None:
            return
        request = urllib.request.Request(self._url, data=content, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_PUSH_TIMEOUT_SECONDS):
            pass


def _make_bar(total_steps: int | None, first_step: int) -> tuple[Progress | None, TaskID | None]:
    """A bar when rank 0 draws on a terminal, its own or the launcher's."""
    columns = os.environ.get(records.TERMINAL_COLUMNS)
    if columns is None and not sys.stderr.isatty():
        return None, None
    console = Console(stderr=True, force_terminal=True if columns else None, width=int(columns) if columns else None)
    bar = Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[pace]}"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    task = bar.add_task("training", total=total_steps, completed=first_step, loss="", pace="")
    bar.start()
    return bar, task
