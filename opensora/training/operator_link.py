"""Rank 0's line to the operator: reports go out over HTTPS, and what is asked of the run comes back in the reply.

The operator never connects to a pod. Nothing here delays training: a thread sends, and an operator that does not answer
is tried again. What is said, when, and what may be asked is described in docs/reference/progress.md.
"""

from __future__ import annotations

import http.client
import json
import logging
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora import records
from opensora.errors import ConfigError

if TYPE_CHECKING:
    from opensora.training.progress import ProgressState, State

logger = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
"""How often the thread looks whether something has to be sent: the shortest time between two reports."""
_INTERVAL_SECONDS = 15.0
"""Longest time between two reports, until the operator names another."""
_TIMEOUT_SECONDS = 5.0
_MAX_RETRY_SECONDS = 15.0
_MAX_REPLY_BYTES = 64 * 1024
_ID = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,62}[A-Za-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class OperatorAddress:
    """Where the operator is, how it is known, and by what it knows us."""

    url: str
    token_file: Path
    ca_file: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> OperatorAddress | None:
        """None where no operator has started this process.

        Raises:
            ConfigError: the variables do not fit together.
        """
        url = environment.get(records.PROGRESS_URL)
        if url is None:
            return None
        missing = [name for name in (records.PROGRESS_TOKEN_FILE, records.PROGRESS_CA_FILE) if name not in environment]
        if missing or not url.startswith("https://") or urllib.parse.urlsplit(url).hostname is None:
            raise ConfigError(
                f"{records.PROGRESS_URL}={url!r}"
                + (f" without {' and '.join(missing)}" if missing else " is no HTTPS"),
                hint=f"the operator sets the {records.PROGRESS_URL.rpartition('_')[0]}_ variables; remove your own, or "
                "use report.progress_url to report elsewhere",
            )
        return cls(
            url=url,
            token_file=Path(environment[records.PROGRESS_TOKEN_FILE]),
            ca_file=Path(environment[records.PROGRESS_CA_FILE]),
        )


class Requests:
    """What the operator has asked of this attempt, and what has become of it.

    The link's thread hears; the training loop saves, and threads of their own write stacks. An id that comes again is
    the same request.

    Args:
        stop: called when the run is to save and stop; perhaps more than once.
        dump: called with the id of a request for stacks, and with what to call when they are written.
    """

    def __init__(self, *, stop: Callable[[], None], dump: Callable[[str, Callable[[], None]], None]) -> None:
        self._stop = stop
        self._dump = dump
        self._checkpoints: list[str] = []
        self._newest_dump: str | None = None
        self._save: tuple[str, int, Callable[[], bool]] | None = None
        self._saved_step: int | None = None
        self._carried_out: dict[str, str] = {}
        self._complained = False

    def hear(self, reply: Mapping[str, Any]) -> None:
        """Take a reply."""
        if (checkpoint := self._id(reply, "checkpoint")) is not None and checkpoint not in self._checkpoints[-1:]:
            logger.info("the operator asks for a checkpoint (%s)", checkpoint)
            self._checkpoints.append(checkpoint)
        if (dump := self._id(reply, "dump")) is not None and dump != self._newest_dump:
            logger.info("the operator asks for the stacks of all ranks (%s)", dump)
            self._newest_dump = dump
            self._dump(dump, lambda: self._carried_out.update(dump=dump))
        if reply.get("stop") is True:
            self._stop()

    @property
    def num_checkpoints(self) -> int:
        """How many checkpoints have been asked for."""
        return len(self._checkpoints)

    def saving(self, number: int, *, step: int, is_committed: Callable[[], bool]) -> None:
        """The first `number` requests for a checkpoint are carried out, with this step, once this is true."""
        self._save = self._checkpoints[number - 1], step, is_committed

    def carried_out(self) -> dict[str, str]:
        """Kind of request → id of the newest one that is done."""
        if self._save is not None and self._save[2]():
            self._carried_out["checkpoint"], self._saved_step, _ = self._save
        return dict(self._carried_out)

    @property
    def saved_step(self) -> int | None:
        """The step that was saved on request, once it is; the loop learns of a commit one step later."""
        return self._saved_step

    def _id(self, reply: Mapping[str, Any], name: str) -> str | None:
        value = reply.get(name)
        if value is None or (isinstance(value, str) and _ID.fullmatch(value)):
            return value
        if not self._complained:
            logger.warning("the operator asks for a %s under an id that is none: %.80r", name, value)
            self._complained = True
        return None


class OperatorLink:
    """A thread that reports: at once when something has happened, and else now and then.

    Args:
        address: of the operator.
        requests: is told what the operator asks for.
        stop_requested: whether the ranks finish their last step; reported before the loop itself knows.
    """

    def __init__(self, address: OperatorAddress, *, requests: Requests, stop_requested: Callable[[], bool]) -> None:
        self.requests = requests
        self._address = address
        self._stop_requested = stop_requested
        self._latest: ProgressState | None = None
        self._closing = threading.Event()
        self._give_up_at = float("inf")
        self._sequence = 0
        self._interval = _INTERVAL_SECONDS
        self._delivered: tuple[Any, ...] | None = None
        """The milestones of the last report that arrived."""
        self._sent_at = -float("inf")
        self._failures = 0
        self._retry_at = -float("inf")
        self._thread = threading.Thread(target=self._run, name="operator-link", daemon=True)
        self._thread.start()

    def update(self, state: ProgressState) -> None:
        """Report this, or what comes after it, when it is time."""
        self._latest = state

    def close(self, state: ProgressState, *, timeout_seconds: float) -> None:
        """Report the last state; gives up after a time, since the launcher's verdict tells the end as well."""
        self._latest = state
        self._give_up_at = time.monotonic() + timeout_seconds
        self._closing.set()

    def join(self) -> None:
        """Wait for the end of `close`."""
        self._thread.join(max(0.0, self._give_up_at - time.monotonic()))

    # ---------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        while True:
            closing = self._closing.is_set()
            if self._latest is not None and self._is_due(self._milestones(self._latest), closing=closing):
                self._report(self._latest)
            if closing and (self._failures == 0 or time.monotonic() >= self._give_up_at):
                return
            if closing:
                time.sleep(_TICK_SECONDS)
            else:
                self._closing.wait(_TICK_SECONDS)

    def _is_due(self, milestones: tuple[Any, ...], *, closing: bool) -> bool:
        now = time.monotonic()
        if closing:
            return True
        if now < self._retry_at:
            return False
        return milestones != self._delivered or now >= self._sent_at + self._interval

    def _milestones(self, state: ProgressState) -> tuple[Any, ...]:
        """What is worth a report of its own when it changes."""
        return (
            state.phase, self._state_of(state), state.step > 0, state.checkpoint_step, state.samples_step,
            self.requests.carried_out(),
        )  # fmt: skip

    def _state_of(self, state: ProgressState) -> State:
        return "Stopping" if self._stop_requested() else state.state

    def _report(self, state: ProgressState) -> None:
        milestones = self._milestones(state)
        carried_out = self.requests.carried_out()
        steps = [step for step in (state.checkpoint_step, self.requests.saved_step) if step is not None]
        state = replace(state, state=self._state_of(state), checkpoint_step=max(steps, default=None))
        self._sequence += 1
        message = {**asdict(state), "sequence": self._sequence, "requests": carried_out}
        try:
            reply = self._post(json.dumps(message).encode())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._failed(str(error) or type(error).__name__, getattr(error, "retry_seconds", None))
            return
        if self._failures:
            logger.info("the operator hears the run again")
        self._failures = 0
        self._delivered = milestones
        self._sent_at = time.monotonic()
        interval = reply.get("interval_seconds")
        if isinstance(interval, int | float) and 1 <= interval <= 3600:
            self._interval = float(interval)
        self.requests.hear(reply)

    def _failed(self, why: str, retry_seconds: float | None) -> None:
        if self._failures == 0:
            logger.warning("progress does not reach the operator: %s; training goes on", why)
        self._failures += 1
        pause = min(_MAX_RETRY_SECONDS, _TICK_SECONDS * 2.0 ** min(self._failures, 10))
        self._retry_at = time.monotonic() + (pause if retry_seconds is None else min(60.0, max(1.0, retry_seconds)))

    def _post(self, body: bytes) -> Mapping[str, Any]:
        """Send a message; returns the reply.

        Both files are read each time: the token is renewed while the run goes on. Proxies and redirects are for others:
        the token goes to the operator alone.
        """
        parts = urllib.parse.urlsplit(self._address.url)
        token = self._address.token_file.read_text().strip()
        tls = ssl.create_default_context(cafile=str(self._address.ca_file))
        connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=_TIMEOUT_SECONDS, context=tls
        )
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Connection": "close"}
        try:
            connection.request("POST", parts.path, body, headers)
            response = connection.getresponse()
            content = response.read(_MAX_REPLY_BYTES)
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise _RefusedError(response.status, content, response.headers.get("Retry-After"))
        reply = json.loads(content)
        if not isinstance(reply, dict):
            raise ValueError(f"the reply is no JSON object: {content[:80]!r}")
        return reply


class _RefusedError(OSError):
    """The operator has answered with an error."""

    def __init__(self, status: int, content: bytes, retry_after: str | None) -> None:
        try:
            told = json.loads(content)["error"]
        except (ValueError, KeyError, TypeError):
            told = http.client.responses.get(status, "")
        super().__init__(f"HTTP {status}: {told}")
        self.retry_seconds = float(retry_after) if retry_after is not None and retry_after.isdigit() else None
