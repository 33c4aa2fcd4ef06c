"""All logs of one object: those of its pods, and where they are gone those of its run directory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

from opensora_operator.api import BATCH_SEARCH, SAMPLE_JOB, TRAINING_RUN, AttemptStatus, TrainingRunStatus
from opensora_operator.views import PodView

from osctl.client import Client, Object
from osctl.errors import ApiError, ExitCode, OsctlError, UsageError
from osctl.log_lines import Choice, Line
from osctl.output import printable
from osctl.pod_logs import LogGoneError, PodLog
from osctl.pods import has_started, list_pods
from osctl.session import Session
from osctl.story import newest_failure, pod_state
from osctl.targets import Target, fetch, is_over, phase_of, read_status

if TYPE_CHECKING:  # imported late: most logs are those of pods
    from osctl.run_logs import RunLogs

MAX_PODS = 256
"""Most pods whose logs are read at the same time; each takes a connection."""
_NUM_THREADS = 16
_ASK = "ask whoever runs the cluster for this right"
_NOUNS = {TRAINING_RUN.name: "rank", SAMPLE_JOB.name: "shard", BATCH_SEARCH.name: "probe"}
"""Kind → what its pods are told apart by."""


class ObjectLogs:
    """The logs of a run, a sample job or a batch search. `attempt` is None where the kind has none."""

    def __init__(self, session: Session, target: Target) -> None:
        if target.kind.name not in _NOUNS:
            raise UsageError(f"{target.name} is a profile", hint="runs, sample jobs and batch searches have logs")
        self.session = session
        self.target = target
        self.body = fetch(session, target)
        self._known: tuple[Object, TrainingRunStatus] = {}, TrainingRunStatus()
        self.is_gone = False
        """The object was deleted meanwhile."""
        self.is_incomplete = False
        """Something could not be read."""
        self.are_pods_closed = False
        """One may not list pods, or not read their logs."""
        self._unread: set[int] = set()
        """Numbers of the pods whose logs could not be read."""

    def refresh(self) -> None:
        """Look at the object again."""
        self.body = fetch(self.session, self.target)

    # What the object tells

    @property
    def noun(self) -> str:
        """What its pods are told apart by."""
        return _NOUNS[self.target.kind.name]

    @property
    def is_run(self) -> bool:
        """Whether it has attempts, ranks and a run directory."""
        return self.target.kind is TRAINING_RUN

    @property
    def status(self) -> TrainingRunStatus:
        """Of a run. Raises OsctlError for one that this osctl cannot read."""
        known, status = self._known
        if known is not self.body:
            status = read_status(self.body)
            self._known = self.body, status
        return status

    @property
    def newest_attempt(self) -> int:
        """The number of the attempt that goes on, or was the last."""
        return max(1, self.status.attempt)

    @property
    def num_ranks(self) -> int:
        """Ranks of the current attempt; 0 where nobody knows yet."""
        return self.status.resolved.world_size or 0

    def record(self, attempt: int) -> AttemptStatus | None:
        """What status tells of an attempt."""
        return next((record for record in self.status.attempts if record.number == attempt), None)

    @property
    def is_over(self) -> bool:
        """Whether it has come to its end."""
        return self.is_gone or is_over(self.body)

    def has_ended(self, attempt: int | None) -> bool:
        """Whether nothing more will be written."""
        if self.is_over:
            return True
        if attempt is None:
            return False
        record = self.record(attempt)
        return self.status.attempt > attempt or (record is not None and record.ended_at is not None)

    def num_pods(self, attempt: int | None) -> int | None:
        """Pods that an attempt has, or had; None where nobody knows."""
        if attempt is None:
            return None
        record = self.record(attempt)
        if record is not None and record.nodes:
            return record.nodes
        return (self.status.nodes.desired or None) if attempt == self.newest_attempt else None

    def first_failed(self, attempt: int | None) -> tuple[int, int]:
        """The rank that failed first in an attempt, by default in the newest that failed; and the attempt.

        Raises:
            OsctlError: nobody knows.
        """
        name = self.target.name
        failure = newest_failure(self.status)
        if attempt is None and failure is None:
            raise OsctlError(
                f"no attempt of {name} has failed",
                hint=f"`osctl logs {name}` shows all ranks",
                exit_code=ExitCode.NOT_FOUND,
            )
        if attempt is None and failure is not None:
            attempt, rank = failure.attempt, failure.rank
        else:
            record = self.record(attempt or 0)
            rank = None if record is None else record.rank
        if rank is None or attempt is None:
            raise OsctlError(
                f"nobody knows which rank of attempt {attempt} of {name} failed first",
                hint=f"`osctl logs {name} --attempt {attempt}` shows all, `osctl status {name}` why it ended",
                exit_code=ExitCode.NOT_FOUND,
            )
        return rank, attempt

    # Pods

    def pods(self, attempt: int | None) -> list[PodView]:
        """The pods of an attempt that are there, as far as one may know."""
        found = list_pods(self.session.client, self.session.namespace, self.body)
        if found is None:
            self._close_pods("you may not list pods")
        return [pod for pod in found or () if attempt in (None, pod.attempt)]

    def _close_pods(self, why: str) -> None:
        if not self.are_pods_closed:
            elsewhere = ": reading the run directory, which is some seconds behind" if self.is_run else ""
            self.session.output.note(f"{why}{elsewhere}")
        self.are_pods_closed = True

    def wanted(self, pods: Sequence[PodView], choice: Choice) -> list[PodView]:
        """The pods that may have what is wanted."""
        if choice.rank is None or self.status.resolved.procs_per_node is None:
            return list(pods)
        return [pod for pod in pods if pod.index == choice.rank // self._procs]

    def refuse_many(self, count: int) -> None:
        """Raises UsageError where there are more pods than can be read at the same time."""
        if count > MAX_PODS:
            raise UsageError(
                f"{self.target.name} has {count} pods, and at most {MAX_PODS} can be read at the same time",
                hint=("--rank N reads one of them; " if self.is_run else "") + "--download DIR takes all",
            )

    def open(self, pod: PodView, choice: Choice, *, client: Client | None = None) -> PodLog:
        """The log of a pod, over a connection of its own unless one is given."""
        number = pod.attempt if self.target.kind is BATCH_SEARCH else pod.index
        client = client or self.session.client.another()
        return PodLog(client, self.session.namespace, pod, choice, number=number)

    def waiting_for(self, pods: Sequence[PodView], attempt: int | None) -> str:
        """What keeps an attempt from having logs, in words."""
        phase = phase_of(self.body) or "not looked at yet by the operator"
        of = "" if attempt is None else f" of attempt {attempt}"
        if not pods:
            return f"{self.target.name} is {phase}: waiting for the pods{of}"
        states = Counter(
            printable(f"{state.state}: {state.message}" if state.message else state.state)
            for pod in pods
            if not has_started(pod)
            for state in [pod_state(pod)]
        )
        words = "; ".join(f"{count} of {len(pods)} {state}" for state, count in states.most_common(3))
        return f"{self.target.name} is {phase}: waiting for the pods{of} to start: {words}"

    # Reading what there is

    def lines(
        self, attempt: int | None, pods: Sequence[PodView], choice: Choice, *, tail: int | None
    ) -> list[Iterator[Line]]:
        """What there is of an attempt with these pods, a stream for each pod or rank; the last `tail` lines of each are
        enough. Until they have come to their ends nothing else can be asked of the API server.

        Raises:
            OsctlError: there is nothing at all.
        """
        started = [pod for pod in pods if has_started(pod)]
        self.refuse_many(len(started))
        first = [self.open(pod, choice, client=self.session.client) for pod in started[:1]]  # is connected already
        logs, streams = self.start([*first, *(self.open(pod, choice) for pod in started[1:])], tail=tail)
        return streams + self.stored_lines(attempt, choice, logs, tail=tail)

    def start(self, logs: Sequence[PodLog], *, tail: int | None) -> tuple[list[PodLog], list[Iterator[Line]]]:
        """Open logs at the same time; returns those that can be read, with their streams."""
        if not logs:
            return [], []
        tail = tail if logs[0].choice.is_all else None
        with ThreadPoolExecutor(min(_NUM_THREADS, len(logs))) as pool:
            opened = list(pool.map(lambda log: self._start_one(log, tail), logs))
        found = [(log, stream) for log, stream in zip(logs, opened, strict=True) if stream is not None]
        return [log for log, _ in found], [stream for _, stream in found]

    def _start_one(self, log: PodLog, tail: int | None) -> Iterator[Line] | None:
        """The stream with its first line at hand; None where the log cannot be read."""
        stream = self.guarded(log, tail)
        try:
            first = next(stream, None)
        except LogGoneError as error:
            self.session.output.detail(f"pod {log.pod.name}: {error.message}")
            return None
        except OsctlError as error:
            if isinstance(error, ApiError) and error.status == 403:
                self._close_pods("you may not read the logs of pods")
            else:
                self._unread.add(log.number)
                self.session.output.note(f"the log of pod {log.pod.name} cannot be read: {printable(error.message)}")
            return None
        return iter(()) if first is None else itertools.chain([first], stream)

    def guarded(self, log: PodLog, tail: int | None = None) -> Iterator[Line]:
        """What there is of a log. Where reading fails after it has begun, it ends and says so: the others go on."""
        has_begun = False
        try:
            for line in log.lines(tail=tail):
                has_begun = True
                yield line
        except OsctlError as error:
            if not has_begun:
                raise
            self.is_incomplete = True
            self.session.output.note(f"the log of pod {log.pod.name} ends here: {printable(error.message)}")
        finally:
            log.close()

    # The run directory

    @cached_property
    def stored(self) -> RunLogs:
        """The logs in the run directory. Raises StorageError, OsctlError."""
        from osctl.run_directory import open_storage
        from osctl.run_logs import RunLogs

        spec = self.body.get("spec") or {}
        return RunLogs(open_storage(str(spec.get("runUri")), spec))

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Reads ahead from the run directory."""
        return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="run directory")

    def close(self) -> None:
        """Give up what was opened."""
        if "pool" in self.__dict__:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def stored_lines(
        self, attempt: int | None, choice: Choice, logs: Sequence[PodLog], *, tail: int | None
    ) -> list[Iterator[Line]]:
        """What there is of the ranks whose pods are not among these.

        Raises:
            OsctlError: there are no pods, and there is nothing.
        """
        if attempt is None or not self.is_run:
            self.is_incomplete |= bool(self._unread)
            if logs:
                return []
            raise self._nothing(attempt, "and they are kept nowhere else")
        missing = self._missing_ranks(attempt, choice, logs)
        if not missing and missing is not None:
            return []
        from opensora.errors import StorageError

        try:
            found = self.stored.ranks(attempt)
            self.is_incomplete |= bool(self._unread - {rank // self._procs for rank in found})
            ranks = [rank for rank in found if missing is None or rank in missing]
            if not ranks and not logs:
                raise self._nothing_stored(attempt, choice, found)
            if ranks and not self.are_pods_closed:
                what = "pods" if not logs else "some pods"
                self.session.output.note(f"{what} of attempt {attempt} are gone: reading {self.stored.uri}")
            enough = tail if choice.pattern is None else None
            return self.stored.lines(attempt, choice, ranks=ranks, pool=self.pool, tail=enough)
        except StorageError as error:
            if not logs:
                words = f"and the run directory cannot be read: {error.message}"
                raise self._nothing(attempt, words, hint=error.hint) from error
            self.is_incomplete = True
            self.session.output.note(f"the run directory cannot be read: {error.message}")
            return []

    def _missing_ranks(self, attempt: int, choice: Choice, logs: Sequence[PodLog]) -> set[int] | None:
        """Ranks that are wanted and whose pods are not among these; None is all that there are."""
        if not logs:
            return None if choice.rank is None else {choice.rank}
        count = self.num_pods(attempt)
        if count is None or choice.rank is not None:
            return set()
        gone = set(range(count)) - {log.number for log in logs}
        return {pod * self._procs + local for pod in gone for local in range(self._procs)}

    @property
    def _procs(self) -> int:
        """Ranks per pod."""
        return self.status.resolved.procs_per_node or 1

    def _nothing_stored(self, attempt: int, choice: Choice, found: Sequence[int]) -> OsctlError:
        if found:
            return OsctlError(
                f"attempt {attempt} of {self.target.name} has no rank {choice.rank}",
                hint=f"it has ranks {found[0]} to {found[-1]}",
                exit_code=ExitCode.NOT_FOUND,
            )
        if self.stored.is_missing_folder:
            hint = "it is a folder of the pods or nodes: mount it here, and give its path instead of the name"
            return self._nothing(attempt, f"and there is no folder {self.stored.uri} on this machine", hint=hint)
        known = self.stored.attempts()
        hint = f"the run directory has attempts {', '.join(map(str, known))}" if known else "did it ever start?"
        return self._nothing(attempt, f"and {self.stored.uri} has none", hint=hint)

    def _nothing(self, attempt: int | None, words: str, *, hint: str | None = None) -> OsctlError:
        name, of = self.target.name, "" if attempt is None else f" of attempt {attempt}"
        if self.are_pods_closed:
            message = f"you may not read the logs of the pods{of} of {name}, {words}"
            return OsctlError(message, hint=hint or _ASK, exit_code=ExitCode.NOT_ALLOWED)
        if self._unread:
            return OsctlError(f"the logs of the pods{of} of {name} cannot be read, {words}", hint=hint)
        hint = hint or f"`osctl get {self.target.kind.short_names[0]} {name} -o yaml` has its last words"
        message = f"there are no logs{of} of {name}: its pods are gone, {words}"
        return OsctlError(message, hint=hint, exit_code=ExitCode.NOT_FOUND)
