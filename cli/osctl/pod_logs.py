"""Logs of pods, read through the API server."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from opensora_operator.constants import TRAINER
from opensora_operator.views import PodView, view_pod
from opensora_operator.wire import format_time

from osctl.client import PODS, RETRIED, Client
from osctl.errors import ApiError, OsctlError, UnreachableError
from osctl.log_lines import NANOSECONDS, Choice, Line, parse_stamp, split_rank

_QUIET_SECONDS = 60.0
"""A stream that says nothing for so long is opened anew: its connection may be dead."""
_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 15.0
_TRIES = 3
_TRIES_FOLLOWING = 8
_LOST = b"unable to retrieve container logs for "
"""What a kubelet answers, as if it were the log, when it has removed it."""


class LogGoneError(OsctlError):
    """The pod or its log is there no longer."""


class PodLog:
    """The log of one pod, and how far it has been read. It has a connection of its own."""

    def __init__(self, client: Client, namespace: str, pod: PodView, choice: Choice, *, number: int) -> None:
        """`number` is that of the pod among those of its owner."""
        self.pod = pod
        self.number = number
        self._client = client
        self._namespace = namespace
        self.choice = choice
        self._time = -1
        """Of the last line that was read."""
        self._num_at_time = 0
        """Lines of that very time that were read."""
        self._is_aborted = threading.Event()

    def abort(self) -> None:
        """End what another thread is waiting for."""
        self._is_aborted.set()
        self._client.abort()

    def close(self) -> None:
        """Give up the connection."""
        self._client.close()

    def lines(self, *, tail: int | None = None) -> Iterator[Line]:
        """What there is, from where reading ended last. Raises as `batches` does."""
        for batch in self.batches(follow=False, tail=tail):
            yield from batch

    def batches(self, *, follow: bool, tail: int | None = None) -> Iterator[list[Line]]:
        """Lines as they arrive, from where reading ended last; with `follow` until the container has ended.

        A connection that is cut off is made anew, and no line is lost or doubled by it.

        Raises:
            LogGoneError: there is no log, or none any more.
            ApiError: it may not be read.
            UnreachableError: the API server stays away.
        """
        failures = 0
        while True:
            try:
                for batch in self._read(follow=follow, tail=tail):
                    failures = 0
                    if batch:
                        yield batch
                if not follow or self._has_ended():
                    return
                pause = _PAUSE_SECONDS  # a proxy on the way has had enough of it
            except (UnreachableError, ApiError) as error:
                if isinstance(error, ApiError) and error.status not in RETRIED:
                    raise self._translated(error) from error
                failures += 1
                if failures >= (_TRIES_FOLLOWING if follow else _TRIES):
                    raise
                pause = min(_MAX_PAUSE_SECONDS, _PAUSE_SECONDS * 2 ** (failures - 1))
            if self._is_aborted.wait(pause):
                return

    def _read(self, *, follow: bool, tail: int | None) -> Iterator[list[Line]]:
        query = {"container": TRAINER, "timestamps": "true"} | ({"follow": "true"} if follow else {})
        if self._time >= 0:
            query["sinceTime"] = format_time(self._time // NANOSECONDS)
        else:
            if self.choice.since is not None:
                query["sinceTime"] = format_time(self.choice.since)
            if tail is not None:
                query["tailLines"] = str(tail)
        path = f"{PODS.path(self._namespace, self.pod.name)}/log"
        seen = _Seen(self._time, self._num_at_time)
        rest = b""
        for piece in self._client.stream(path, query, quiet_seconds=_QUIET_SECONDS if follow else None):
            *whole, rest = (rest + piece).split(b"\n")
            if whole:
                yield self._take(whole, seen)
        if rest:
            yield self._take([rest], seen)

    def _take(self, raw_lines: list[bytes], seen: _Seen) -> list[Line]:
        found: list[Line] = []
        take, has_ranks = self.choice.take, self.choice.has_ranks
        earliest = -1 if self.choice.since is None else int(self.choice.since * NANOSECONDS)
        for raw in raw_lines:
            stamp, _, text = raw.partition(b" ")
            try:
                moment = parse_stamp(stamp)
            except ValueError:
                if self._time < 0 and raw.startswith(_LOST):
                    raise LogGoneError(f"the log of pod {self.pod.name} is gone from its node") from None
                moment, text = max(self._time, 0), raw  # words of the kubelet
            else:
                if seen.has(moment):
                    continue
                if moment == self._time:
                    self._num_at_time += 1
                else:
                    self._time, self._num_at_time = moment, 1
            if moment < earliest:
                continue
            source, text = split_rank(text, pod=self.number) if has_ranks else (self.number, text)
            line = take(moment, source, text)
            if line is not None:
                found.append(line)
        return found

    def _has_ended(self) -> bool:
        try:
            body = self._client.find(PODS, self._namespace, self.pod.name)
        except ApiError as error:
            if error.status in RETRIED:
                raise
            return True  # one who may read logs and not pods is told what the log tells
        view = None if body is None else view_pod(body)
        return view is None or view.uid != self.pod.uid or view.exit_code is not None or not view.is_live

    def _translated(self, error: ApiError) -> OsctlError:
        """A pod that is gone, or whose container never started, has no log."""
        if error.status in (400, 404) and error.reason != "UnknownKind":
            return LogGoneError(error.message)
        return error


class _Seen:
    """Which of the lines that are read once more have been read before. Times of a request are in whole seconds."""

    def __init__(self, last: int, num_at_last: int) -> None:
        self._last = last
        self._num_left = num_at_last

    def has(self, moment: int) -> bool:
        """Whether a line of this time was read before; to be asked once for each line."""
        if moment > self._last:
            self._last = -1  # from here on all is new, whatever the pod's clock does
            return False
        if moment < self._last:
            return True
        self._num_left -= 1
        return self._num_left >= 0
