"""`osctl logs`: what ranks print, from their pods and from the run directory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from opensora_operator.views import PodView
from opensora_operator.wire import parse_time

from osctl.completing import complete_attempt, complete_rank, complete_target
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.log_following import Follower, last
from osctl.log_lines import Choice, Line, label, merge
from osctl.log_sources import ObjectLogs
from osctl.output import Output
from osctl.pod_logs import PodLog
from osctl.pods import has_started
from osctl.run_directory import is_address
from osctl.session import Session
from osctl.targets import parse_target, phase_of
from osctl.waiting import parse_duration

if TYPE_CHECKING:  # imported late: most logs are those of pods
    from osctl.run_logs import RunLogs

_POLL_SECONDS = 2.0
_MAX_BATCH = 512
_NUM_THREADS = 16


def logs(
    session: Session,
    target: Annotated[
        str,
        typer.Argument(metavar="[KIND/]NAME", help="Name of a run, or KIND/NAME.", autocompletion=complete_target),
    ],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    rank: Annotated[
        str, typer.Option("--rank", metavar="N|all|first-failed", help="Whose lines.", autocompletion=complete_rank)
    ] = "all",
    attempt: Annotated[
        str | None,
        typer.Option(
            "--attempt", metavar="N|all", help="Which attempt. [default: newest]", autocompletion=complete_attempt
        ),
    ] = None,
    tail: Annotated[int | None, typer.Option("--tail", min=0, metavar="N", help="Only the last lines.")] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Only lines since 10m ago, or since a time of RFC 3339."),
    ] = None,
    grep: Annotated[
        str | None, typer.Option("--grep", metavar="REGEX", help="Only lines in which this is found.")
    ] = None,
    download: Annotated[
        Path | None, typer.Option("--download", metavar="DIR", help="Write a file for each rank instead.")
    ] = None,
) -> ExitCode:
    """Show what the ranks of a run have printed.

    The lines of all ranks come in the order of time, each with its rank; `[pod 0]` are words of a pod's launcher. Pods
    that have not started are waited for. With `--follow` it goes on from attempt to attempt until the run has ended.
    What pods that are gone have printed is read from the run directory, where times are those that the ranks printed
    themselves. Of `sj/NAME` and `bs/NAME` the lines come with the number of the shard or probe.

    Examples: `osctl logs first -f`, `osctl logs first --rank first-failed --tail 50`, `osctl logs first --attempt 2
    --since 10m --grep loss`, `osctl logs sj/nightly`, `osctl logs first --attempt all --download logs`.
    """
    if download is not None and (follow or tail is not None):
        raise UsageError("--download writes whole logs", hint="leave out --follow and --tail")
    wanted = _Wanted(
        rank=rank,
        attempt=attempt,
        pattern=_pattern(grep),
        since=None if since is None else _moment(since),
    )
    if is_address(target):
        return _logs_of_folder(session, target, wanted, follow=follow, tail=tail, download=download)
    found = ObjectLogs(session, parse_target(target))
    choice, attempts = _choose(found, wanted)
    try:
        if download is not None:
            _download(session, found, choice, attempts, download)
        elif follow:
            Follower(found, choice, _printer(session, found, choice)).run(attempts[0], tail=tail)
            if found.is_gone:
                raise OsctlError(f"{found.target.name} was deleted meanwhile", exit_code=ExitCode.NOT_FOUND)
        else:
            lines = _lines(found, choice, attempts, tail)
            _printer(session, found, choice).write(last(lines, tail))
    finally:
        found.close()
    return ExitCode.ERROR if found.is_incomplete else ExitCode.OK


# -------------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What the options say."""

    rank: str
    attempt: str | None
    pattern: re.Pattern[str] | None
    since: float | None

    def choice(self, rank: int | None, *, has_ranks: bool = True) -> Choice:
        return Choice(rank=rank, pattern=self.pattern, since=self.since, has_ranks=has_ranks)


def _choose(found: ObjectLogs, wanted: _Wanted) -> tuple[Choice, list[int | None]]:
    """Which lines, of which attempts. Raises OsctlError where there is no such rank or attempt."""
    name = found.target.name
    if not found.is_run:
        if wanted.rank != "all" or wanted.attempt is not None:
            raise UsageError(f"--rank and --attempt are for runs; {name} has {found.noun}s", hint="leave them out")
        return wanted.choice(None, has_ranks=False), [None]
    newest = found.newest_attempt
    attempts = _attempts(name, newest, wanted.attempt)
    if wanted.rank == "first-failed":
        rank, attempt = found.first_failed(attempts[0] if wanted.attempt not in (None, "all") else None)
        return wanted.choice(rank), [attempt]
    rank_or_all = _rank(wanted.rank)
    if rank_or_all is not None and found.num_ranks and rank_or_all >= found.num_ranks and attempts == [newest]:
        raise OsctlError(
            f"{name} has no rank {rank_or_all}",
            hint=f"its ranks are 0 to {found.num_ranks - 1}",
            exit_code=ExitCode.NOT_FOUND,
        )
    return wanted.choice(rank_or_all), [*attempts]


def _attempts(name: str, newest: int, text: str | None) -> list[int]:
    if text is None:
        return [newest]
    if text == "all":
        return list(range(1, newest + 1))
    number = _number(text, "--attempt", "a number, or all")
    if not 1 <= number <= newest:
        raise OsctlError(
            f"{name} has no attempt {number}",
            hint=f"its attempts are 1 to {newest}" if newest > 1 else "it has attempt 1 alone",
            exit_code=ExitCode.NOT_FOUND,
        )
    return [number]


def _rank(text: str) -> int | None:
    return None if text == "all" else _number(text, "--rank", "a number, all, or first-failed")


def _number(text: str, flag: str, wanted: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8):
        raise UsageError(f"{flag} {text!r} is not understood", hint=f"give {wanted}")
    return int(text)


def _pattern(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise UsageError(f"--grep {text!r} is no regular expression: {error}", hint="write \\. for a dot") from error


def _moment(text: str) -> float:
    """Seconds since 1970 of `10m`, or of a time."""
    if "T" in text or ":" in text:
        try:
            return parse_time(text)
        except ValueError as error:
            raise UsageError(f"--since {text!r} is no time", hint="such as 2026-01-31T12:00:00Z, or 10m") from error
    return time.time() - parse_duration(text, flag="--since")


# -------------------------------------------------------------------------------------------------------------- showing


class _Printer:
    """Writes lines in batches that grow, so that the first one is out at once."""

    def __init__(self, output: Output, *, noun: str, num_sources: int, has_labels: bool) -> None:
        self._output = output
        self._noun = noun
        self._has_labels = has_labels
        self._width = len(str(max(0, num_sources - 1)))
        self._labels: dict[int, str] = {}

    def write(self, lines: Iterable[Line]) -> None:
        """Lines, as they come."""
        batch: list[str] = []
        size = 1
        for line in lines:
            batch.append(self._label(line.source) + line.text)
            if len(batch) >= size:
                self._output.data("\n".join(batch), flush=True)
                batch, size = [], min(_MAX_BATCH, 2 * size)
        if batch:
            self._output.data("\n".join(batch), flush=True)

    def _label(self, source: int) -> str:
        if not self._has_labels:
            return ""
        known = self._labels.get(source)
        if known is None:
            known = self._output.styled(label(source, noun=self._noun, width=self._width), "dim")
            self._labels[source] = known
        return known


def _printer(session: Session, found: ObjectLogs, choice: Choice) -> _Printer:
    is_one = choice.rank is not None or (found.is_run and found.num_ranks == 1)
    return _Printer(session.output, noun=found.noun, num_sources=found.num_ranks, has_labels=not is_one)


def _lines(found: ObjectLogs, choice: Choice, attempts: Sequence[int | None], tail: int | None) -> Iterator[Line]:
    """What there is of the attempts, one after the other."""
    for attempt in attempts:
        pods = _await_start(found, attempt, choice)
        try:
            streams = found.lines(attempt, pods, choice, tail=tail)
        except OsctlError as error:
            if len(attempts) == 1 or error.exit_code is not ExitCode.NOT_FOUND:
                raise
            found.session.output.note(error.message)
            continue
        yield from merge(streams)


def _await_start(found: ObjectLogs, attempt: int | None, choice: Choice) -> list[PodView]:
    """The pods of an attempt; of one that begins when the first of them has started."""
    said = ""
    while True:
        pods = found.wanted(found.pods(attempt), choice)
        is_waiting = not found.has_ended(attempt) and phase_of(found.body) != "Suspended"
        if not is_waiting or found.are_pods_closed or any(map(has_started, pods)):
            return pods
        words = found.waiting_for(pods, attempt)
        if words != said:
            found.session.output.note(words)
            said = words
        time.sleep(_POLL_SECONDS)
        found.refresh()


def _logs_of_folder(
    session: Session, address: str, wanted: _Wanted, *, follow: bool, tail: int | None, download: Path | None
) -> ExitCode:
    """The logs in a run directory that is given by its address: no API server is asked."""
    from osctl.run_directory import open_run_directory  # slow to import
    from osctl.run_logs import RunLogs

    run = RunLogs(open_run_directory(session, address).storage)
    known = run.attempts()
    if not known:
        raise OsctlError(
            f"{run.uri} holds no logs",
            hint="the launcher keeps them where it is given the run directory; is this one?",
            exit_code=ExitCode.NOT_FOUND,
        )
    attempts = _attempts(address, known[-1], wanted.attempt)
    rank: int | None
    if wanted.rank == "first-failed":
        rank, failed = _first_failed(run, attempts if wanted.attempt not in (None, "all") else known)
        attempts = [failed]
    else:
        rank = _rank(wanted.rank)
    choice = wanted.choice(rank)
    num_ranks = max(run.ranks(attempts[-1]), default=0) + 1
    printer = _Printer(session.output, noun="rank", num_sources=num_ranks, has_labels=rank is None and num_ranks > 1)
    if follow:
        for batch in run.follow(attempts[-1], choice, is_over=lambda: False):
            printer.write(batch)
        return ExitCode.OK
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for attempt in attempts:
            ranks = run.ranks(attempt) if rank is None else [rank]
            streams = run.lines(attempt, choice, ranks=ranks, pool=pool, tail=tail)
            if download is not None:
                folders = [download / f"attempt-{attempt}"] * len(streams)
                _print_paths(session, pool.map(_write_files, streams, folders))
            else:
                printer.write(last(merge(streams), tail))
    return ExitCode.OK


def _first_failed(run: RunLogs, attempts: Sequence[int]) -> tuple[int, int]:
    for attempt in reversed(attempts):
        verdict = run.verdict(attempt)
        if verdict is not None and verdict.first is not None:
            return verdict.first.rank, attempt
    raise OsctlError(f"no attempt of {run.uri} has failed", hint="leave out --rank", exit_code=ExitCode.NOT_FOUND)


# ---------------------------------------------------------------------------------------------------------- downloading


def _download(
    session: Session, found: ObjectLogs, choice: Choice, attempts: Sequence[int | None], folder: Path
) -> None:
    """A file for each rank of each attempt, and for each pod of other kinds."""
    for attempt in attempts:
        place = folder / (found.target.name if attempt is None else f"attempt-{attempt}")
        pods = found.wanted(found.pods(attempt), choice)
        logs = [found.open(pod, choice) for pod in pods if has_started(pod)]
        readable: list[PodLog] = []
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for start in range(0, len(logs), _NUM_THREADS):
                opened, streams = found.start(logs[start : start + _NUM_THREADS], tail=None)
                stems = [None if found.is_run else log.pod.name for log in opened]
                _print_paths(session, pool.map(_write_files, streams, [place] * len(streams), stems))
                readable += opened
            rest = found.stored_lines(attempt, choice, readable, tail=None)
            _print_paths(session, pool.map(_write_files, rest, [place] * len(rest)))


def _print_paths(session: Session, written: Iterable[list[Path]]) -> None:
    for paths in written:
        for path in paths:
            session.output.data(str(path))


def _write_files(lines: Iterator[Line], folder: Path, stem: str | None = None) -> list[Path]:
    """A file for each source of the lines, or one of this name; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, TextIO] = {}
    partial = {}
    try:
        with ExitStack() as stack:
            for line in lines:
                name = stem or (f"rank-{line.source}" if line.source >= 0 else f"pod-{-1 - line.source}")
                if name not in files:
                    partial[name] = folder / f".{name}.log.partial"
                    files[name] = stack.enter_context(open(partial[name], "w", encoding="utf-8"))
                files[name].write(line.text + "\n")
        return sorted(partial[name].replace(folder / f"{name}.log") for name in files)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
