"""Following logs while they are written: from pod to pod and from attempt to attempt, until there is no more."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

from opensora_operator.views import PodView

from osctl.client import RETRIED, Client, Object
from osctl.errors import ApiError, OsctlError, UnreachableError
from osctl.log_lines import Choice, Line, Window, merge
from osctl.log_sources import ObjectLogs
from osctl.output import printable
from osctl.pod_logs import LogGoneError, PodLog
from osctl.pods import has_started
from osctl.targets import phase_of
from osctl.waiting import versions

_WINDOW_SECONDS = 0.25
"""How long a line is held back for earlier ones of other pods."""
_LOOK_SECONDS = 2.0
"""Pause between looks at the pods while some have not started."""
_LOOK_SHARE = 20.0
"""A look that takes long, since there are many pods, is followed by a pause that is so many times longer."""
_LOOK_AGAIN_SECONDS = 15.0
_TURN_SECONDS = 0.5
_JOIN_SECONDS = 2.0
_MAX_EVENTS = 256


class Sink(Protocol):
    """Where lines go."""

    def write(self, lines: Iterable[Line]) -> None: ...


class _Ended:
    """A log has come to its end."""


class _State:
    """The object has changed; None is its deletion."""

    def __init__(self, body: Object | None) -> None:
        self.body = body


_Event = list[Line] | _Ended | _State | Exception


class Follower:
    """Follows the logs of one object. Each log has a thread; what they read meets in one queue of bounded size."""

    def __init__(self, logs: ObjectLogs, choice: Choice, sink: Sink) -> None:
        self._logs = logs
        self._choice = choice
        self._sink = sink
        self._note = logs.session.output.note
        self._events: queue.Queue[_Event] = queue.Queue(_MAX_EVENTS)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._clients: list[Client | PodLog] = []
        self._num_running = 0
        self._said = ""

    def run(self, attempt: int | None, *, tail: int | None) -> None:
        """Write everything from this attempt on, and return when the object is over; of what there is already, the
        last `tail` lines."""
        watching = self._logs.session.client.another()
        self._clients.append(watching)
        self._spawn(self._watch, watching)
        try:
            following: int | None = attempt
            while True:
                self._follow(following, tail)
                tail = None
                if following is None or (newer := self._next_attempt(following)) is None:
                    return
                record = self._logs.record(following)
                why = f" ({record.cause})" if record is not None and record.cause else ""
                self._note(f"attempt {following} has ended{why}: going on with attempt {newer}")
                following = newer
        finally:
            self._stop()

    # One attempt

    def _follow(self, attempt: int | None, tail: int | None) -> None:
        window = Window(0.0 if self._logs.num_pods(attempt) == 1 or self._choice.rank is not None else _WINDOW_SECONDS)
        known: dict[str, PodLog | None] = {}
        is_from_store = False
        has_looked_last = False
        next_look = 0.0
        while True:
            now = time.monotonic()
            has_ended = self._logs.has_ended(attempt)
            if is_from_store:
                has_looked_last = has_ended
            elif now >= next_look or has_ended != has_looked_last:
                has_looked_last = has_ended
                wanted = self._logs.wanted(self._look(attempt), self._choice)
                pause = max(_LOOK_SECONDS, _LOOK_SHARE * (time.monotonic() - now))
                started = [pod for pod in wanted if has_started(pod) and pod.uid not in known]
                self._logs.refuse_many(self._num_running + len(started))
                known |= {pod.uid: None for pod in started}
                known |= {log.pod.uid: log for log in self._join(started, tail)}
                tail = None if started else tail
                if self._logs.are_pods_closed and attempt is not None:
                    is_from_store = True
                    self._spawn_reader(self._follow_store, attempt)
                count = 1 if self._choice.rank is not None else self._logs.num_pods(attempt)
                next_look = time.monotonic() + (_LOOK_AGAIN_SECONDS if count == len(known) else pause)
                if not known and not has_ended and not is_from_store:
                    self._say(self._logs.waiting_for(wanted, attempt))
            if has_looked_last and not self._num_running and self._events.empty():
                break
            waits = [_TURN_SECONDS, max(0.0, next_look - now), window.wait(now=now)]
            self._take(window, timeout=min(wait for wait in waits if wait is not None))
            self._sink.write(window.due(now=time.monotonic()))
        self._sink.write(window.rest())
        if not is_from_store and not self._logs.is_gone:
            self._write_rest(attempt, [log for log in known.values() if log is not None], tail)

    def _look(self, attempt: int | None) -> list[PodView]:
        """The pods; none while the API server is away."""
        try:
            return self._logs.pods(attempt)
        except (UnreachableError, ApiError) as error:
            if isinstance(error, ApiError) and error.status not in RETRIED:
                raise
            return []

    def _join(self, pods: Sequence[PodView], tail: int | None) -> list[PodLog]:
        """Write what these pods have said so far, in the order of time, and listen to them from there on."""
        readable, streams = self._logs.start([self._logs.open(pod, self._choice) for pod in pods], tail=tail)
        self._sink.write(last(merge(streams), tail))
        for log in readable:
            if log.pod.exit_code is None and log.pod.is_live:
                self._clients.append(log)
                self._spawn_reader(self._listen, log)
        return readable

    def _write_rest(self, attempt: int | None, logs: Sequence[PodLog], tail: int | None) -> None:
        """Of pods that were gone before anybody could listen to them."""
        try:
            self._sink.write(last(merge(self._logs.stored_lines(attempt, self._choice, logs, tail=tail)), tail))
        except OsctlError as error:
            self._logs.is_incomplete = True
            self._note(error.message)

    def _next_attempt(self, attempt: int) -> int | None:
        """The number of the next attempt, when there is one; None when there will be none."""
        nothing = Window(0.0)
        while True:
            newest = 0 if self._logs.is_gone else self._logs.status.attempt
            if newest > attempt:
                return attempt + 1
            if self._logs.is_over:
                return None
            self._say(f"{self._logs.target.name} is {phase_of(self._logs.body)}: waiting for attempt {attempt + 1}")
            self._take(nothing, timeout=_TURN_SECONDS)

    def _say(self, words: str) -> None:
        if words != self._said:
            self._note(words)
            self._said = words

    # Threads, and what they bring

    def _take(self, window: Window, *, timeout: float) -> None:
        """Wait for something to happen, and take what has happened by then."""
        with suppress(queue.Empty):
            event = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
            while True:
                self._handle(event, window)
                event = self._events.get_nowait()

    def _handle(self, event: _Event, window: Window) -> None:
        if isinstance(event, list):
            window.add(event, now=time.monotonic())
        elif isinstance(event, _Ended):
            self._num_running -= 1
        elif isinstance(event, _State):
            self._logs.is_gone = event.body is None
            self._logs.body = event.body or self._logs.body
        else:
            raise event

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name=target.__name__, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _spawn_reader(self, target: Callable[..., None], *arguments: object) -> None:
        self._num_running += 1
        self._spawn(target, *arguments)

    def _put(self, event: _Event) -> None:
        """Wait until there is room: whoever writes faster than a terminal can show is held up here."""
        while not self._stopping.is_set():
            with suppress(queue.Full):
                self._events.put(event, timeout=_TURN_SECONDS)
                return

    def _watch(self, client: Client) -> None:
        logs = self._logs
        try:
            for body in versions(
                client,
                logs.session.namespace,
                logs.target,
                on_trouble=lambda error: self._note(f"{error.message}; trying again"),
                sleep=self._stopping.wait,
            ):
                if body is not None and body["metadata"]["uid"] != logs.body["metadata"]["uid"]:
                    body = None  # another one of the same name
                self._put(_State(body))
                if body is None or self._stopping.is_set():
                    return
        except Exception as error:
            self._put(error)

    def _listen(self, log: PodLog) -> None:
        try:
            for batch in log.batches(follow=True):
                self._put(batch)
                if self._stopping.is_set():
                    return
        except LogGoneError:
            pass  # the pod was deleted, and its log with it; what it had said is out
        except OsctlError as error:
            if not self._stopping.is_set():
                self._logs.is_incomplete = True
                self._note(f"the log of pod {log.pod.name} ends here: {printable(error.message)}")
        except Exception as error:
            self._put(error)
        finally:
            log.close()
            self._put(_Ended())

    def _follow_store(self, attempt: int) -> None:
        def is_over() -> bool:
            return self._logs.has_ended(attempt) or self._stopping.is_set()

        try:
            for batch in self._logs.stored.follow(attempt, self._choice, is_over=is_over):
                self._put(batch)
        except Exception as error:
            self._put(error)
        finally:
            self._put(_Ended())

    def _stop(self) -> None:
        self._stopping.set()
        for client in self._clients:
            client.abort()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def last(lines: Iterator[Line], count: int | None) -> Iterable[Line]:
    """The last so many lines; all of them without a number."""
    return lines if count is None else deque(lines, maxlen=count)
