"""Starts the ranks of a run on this machine and ends as the rank that failed first: `python -m opensora.launch`.

torchrun turns every failure into exit code 1, and kills ranks 30 s after SIGTERM whatever the job allows. The operator
decides by exit codes and long saves must be allowed to finish, so this launcher exists. It is PID 1 of a pod and the
parent of a local run. How it decides is written in docs/concepts/launcher.md. Importing this module imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import logging
import math
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from opensora import records
from opensora.cgroups import OomKills
from opensora.errors import ExitCode, OpenSoraError, PeerLostError, StorageError, UsageError
from opensora.processes import dying_with_this_process
from opensora.rank_output import RankStream, Screen
from opensora.records import MEANINGS, EndRecord, Verdict

if TYPE_CHECKING:
    from opensora.spool import PartSpool
    from opensora.storage import Storage

logger = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
"""How often deadlines and cgroups are looked at while nothing else happens."""
_KILL_SECONDS = 10.0
"""How long a killed process may take to end; one that stands in the kernel longer is left behind."""
_DRAIN_SECONDS = 5.0
"""How long output may arrive after the last rank has ended."""
_PUBLISH_SECONDS = 30.0
"""Longest outage of the store that is waited out when the verdict is written."""
_MULTI_NODE_PORT = 29500
_FREE_PORTS = range(20_000, 32_000)
"""Below the ports that the kernel hands to outgoing connections, so that none of those takes it first."""
_TERMINATION_LOG_BYTES = 4096
"""What Kubernetes keeps of a termination message."""
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _option(help_text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """What to start. Every setting is a flag (`--nproc-per-node`) and a variable (`OPENSORA_NPROC_PER_NODE`)."""

    module: str
    """Module (`opensora.train`) or Python file that is the rank's program."""
    arguments: tuple[str, ...] = ()
    """Its arguments."""
    nproc_per_node: int = _option("ranks on this machine", 1)
    nnodes: int = _option("machines", 1)
    node_rank: int = _option("number of this machine, from 0; JOB_COMPLETION_INDEX with several machines", 0)
    master_addr: str = _option("address of machine 0", "127.0.0.1")
    master_port: int = _option(f"port of rank 0; 0 takes a free one, {_MULTI_NODE_PORT} with several machines", 0)
    attempt: int | None = _option("number of this attempt; the next free one of the run directory unless given", None)
    run_uri: str | None = _option("run directory, which gets logs, end records and the verdict", None)
    grace_seconds: float = _option("after a failure, time for the other ranks to notice before they are killed", 30.0)
    save_deadline_seconds: float = _option(
        "after SIGTERM, time for the ranks to save before they are killed; should exceed the program's own deadline "
        "(checkpoint.stop_deadline_seconds), and the pod's grace period should exceed it",
        620.0,
    )
    rendezvous_seconds: float = _option("time for the name of machine 0 to resolve, on the other machines", 300.0)

    def __post_init__(self) -> None:
        for name in ("nproc_per_node", "nnodes", "attempt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_flag(name)} {value} is below 1", hint="use a whole number from 1")
        for name in ("grace_seconds", "save_deadline_seconds", "rendezvous_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{_flag(name)} {getattr(self, name)} is no duration", hint="use seconds from 0")
        if not 0 <= self.node_rank < self.nnodes:
            raise UsageError(
                f"--node-rank {self.node_rank} with --nnodes {self.nnodes}", hint=f"use 0 to {self.nnodes - 1}"
            )
        if not 0 <= self.master_port < 65536:
            raise UsageError(f"--master-port {self.master_port} is no port", hint="use 0 to 65535")
        if self.nnodes > 1 and self.run_uri and self.attempt is None:
            raise UsageError(
                "several machines and a run directory, but no --attempt", hint="give the same number on every machine"
            )

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node


# ------------------------------------------------------------------------------------------------ command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="python -m opensora.launch --help lists the options")


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> LaunchConfig:
    """The settings of a command line; the environment fills in what it leaves open.

    Raises:
        UsageError: an option is unknown, a value impossible, or there is no such program.
    """
    parser = _Parser(
        prog="python -m opensora.launch",
        description="Start the ranks of a run on this machine; exit with the code of the one that failed first.",
        allow_abbrev=False,
    )
    kinds = {"int": int, "int | None": int, "float": float}
    for option in fields(LaunchConfig):
        if "help" in option.metadata:
            variable = f"OPENSORA_{option.name.upper()}"
            default = None if option.name == "node_rank" else option.default  # a Job's index may stand in for it
            parser.add_argument(
                _flag(option.name),
                type=kinds.get(str(option.type), str),
                default=environment.get(variable, default),
                metavar=option.name.rpartition("_")[2].upper(),
                help=f"{option.metadata['help']} (${variable}; default: {option.default})",
            )
    parser.add_argument("module", help="module or Python file that every rank runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    values = vars(parser.parse_args(arguments))
    if values["node_rank"] is None:
        index = environment.get("JOB_COMPLETION_INDEX", "") if values["nnodes"] > 1 else ""
        values["node_rank"] = int(index) if index.isdigit() else 0
    config = LaunchConfig(**values | {"arguments": tuple(values["arguments"])})
    _check_program(config.module)
    return config


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_file(module: str) -> bool:
    return module.endswith(".py") or os.sep in module


def _check_program(module: str) -> None:
    """A wrong name is found here once and not in every rank. Only the top package is looked up, nothing is imported."""
    if _is_file(module):
        if not Path(module).is_file():
            raise UsageError(f"there is no file {module}", hint="give a module, as after `python -m`, or a Python file")
    elif importlib.machinery.PathFinder.find_spec(module.partition(".")[0], [os.getcwd(), *sys.path]) is None:
        raise UsageError(f"there is no module {module}", hint="give a module, as after `python -m`, or a Python file")


# --------------------------------------------------------------------------------------------------- decisions


@dataclass(frozen=True, kw_only=True)
class Exit:
    """What the launcher saw of the end of a rank."""

    rank: int
    time: float
    """Seconds since 1970."""
    status: int
    """Exit status, or minus the signal that killed it, as in `subprocess`."""
    oom_killed: str | None = None
    """The kernel's OOM killer did it: which limit was reached."""
    killed: EndRecord | None = None
    """The launcher did it: the record that says why."""
    stop_signal: int | None = None
    """The first signal by which the launcher itself was asked to stop."""


def record_of(seen: Exit, left: EndRecord | None) -> EndRecord:
    """The end record of a rank from what it wrote itself and what the launcher saw.

    A failure that the rank has written down itself stands, whatever its process did afterwards: the cause comes before
    the consequences. Success is believed only when the process ended well, too.
    """
    if left is not None and left.code != ExitCode.DONE:
        return replace(left, rank=seen.rank, code=left.code if left.code in MEANINGS else int(ExitCode.FAILED))
    if seen.status == 0:
        return EndRecord(rank=seen.rank, time=seen.time, code=int(ExitCode.DONE), reason="done", message="")
    if seen.status == -signal.SIGKILL and seen.killed is not None:
        return seen.killed
    if seen.status == -signal.SIGKILL and seen.oom_killed is not None:
        code, reason, message = ExitCode.OUT_OF_MEMORY, "killed by SIGKILL", seen.oom_killed
    elif seen.stop_signal is not None and -seen.status in _STOP_SIGNALS:
        code = ExitCode.INTERRUPTED if seen.stop_signal == signal.SIGINT else ExitCode.STOPPED
        reason = f"killed by {_signal_name(-seen.status)}"
        message = "asked to stop before it could save anything new; the newest checkpoint stays"
    elif seen.status < 0:
        code, reason, message = ExitCode.FAILED, f"killed by {_signal_name(-seen.status)}", ""
    else:
        known = seen.status in MEANINGS
        code, reason, message = ExitCode(seen.status if known else 1), f"exit status {seen.status}", ""
    return EndRecord(rank=seen.rank, time=seen.time, code=int(code), reason=reason, message=message)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def termination_message(verdict: Verdict) -> bytes:
    """The verdict as JSON, short enough for Kubernetes: the oldest last words go first, then the samples, then text."""
    while len(data := verdict.to_json().encode()) > _TERMINATION_LOG_BYTES:
        first = verdict.first
        if first is not None and first.last_words:
            verdict = replace(verdict, first=replace(first, last_words=first.last_words[1:]))
        elif first is not None and first.samples:
            verdict = replace(verdict, first=replace(first, samples=first.samples[:-1]))
        elif first is not None and len(first.message) > 500:
            verdict = replace(verdict, first=replace(first, message=first.message[:500]))
        elif len(verdict.message) > 500:
            verdict = replace(verdict, message=verdict.message[:500])
        elif verdict.codes:
            verdict = replace(verdict, codes={})
        else:
            verdict = replace(verdict, first=None)
    return data


# ----------------------------------------------------------------------------------------------------- process

_GUARDIAN = """
import os, signal, sys
groups = []
for line in iter(sys.stdin.buffer.readline, b""):
    if line == b"done\\n":
        sys.exit()
    groups.append(int(line))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""
"""Outlives a launcher that was killed, just long enough to kill the ranks' process groups: their children, too."""


class _Rank:
    """One rank's process and what is known of its end."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], record_file: Path) -> None:
        self.rank = rank
        self.process = process
        self.record_file = record_file
        self.last_words: deque[bytes] = deque(maxlen=records.MAX_LAST_WORDS)
        self.end: EndRecord | None = None
        self.killed: EndRecord | None = None
        self.gone = False
        """The process has ended: its number may soon be another's."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def left_record(self) -> EndRecord | None:
        try:
            return EndRecord.from_json(self.record_file.read_bytes())
        except (OSError, ValueError):
            return None

    def record(self) -> EndRecord:
        """The final record; the output that was still on its way when the rank ended is in its last words."""
        assert self.end is not None
        if self.end.last_words or self.end.code in (ExitCode.DONE, ExitCode.STOPPED):
            return self.end
        return replace(self.end, last_words=[word.decode(errors="replace") for word in self.last_words])


class _AskedToStopError(BaseException):
    """A signal came before any rank was started. Like KeyboardInterrupt it passes by what handles mere errors."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Launcher:
    """The ranks of this machine, from the first to the last process. One main-thread loop, no locks."""

    def __init__(self, config: LaunchConfig, *, environment: Mapping[str, str], scratch: Path, err: Screen) -> None:
        self._config = config
        self._environment = environment
        self._scratch = scratch
        self._ranks: list[_Rank] = []
        self._started = False
        self._stop_signals: list[int] = []
        self._deadline = math.inf
        """Monotonic time at which the ranks that are left get killed."""
        self._deadline_reason: tuple[ExitCode, str] = (ExitCode.FAILED, "")
        self._oom_kills = OomKills()
        self._selector = selectors.DefaultSelector()
        self._guardian: subprocess.Popen[bytes] | None = None
        on_terminal = os.isatty(2)
        self._screens = {1: err if on_terminal and os.isatty(1) else Screen(1), 2: err}
        self._raw = {1: os.isatty(1), 2: on_terminal}

    # ------------------------------------------------------------------------------------------------ signals

    def listen(self) -> None:
        """Take over the signals of this process. A signal that the parent has it ignore (nohup) stays ignored."""
        for signum in _STOP_SIGNALS:
            if signum == signal.SIGTERM or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._on_stop)
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(reader, selectors.EVENT_READ)

    def _on_stop(self, signum: int, _frame: FrameType | None) -> None:
        """Forwarded from here and not from the loop, which a screen that takes no output may hold up."""
        self._stop_signals.append(signum)
        if not self._started:
            raise _AskedToStopError(signum)
        for rank in self._ranks:
            self._ask_to_stop(rank)
        asked = len(self._stop_signals)
        if asked == 1:
            seconds = self._config.save_deadline_seconds
            code = ExitCode.INTERRUPTED if signum == signal.SIGINT else ExitCode.FAILED
            self._kill_within(seconds, code, f"did not stop within {seconds:g} s after {_signal_name(signum)}")
        elif asked == 3:
            code = ExitCode.INTERRUPTED if self._stop_signals[0] == signal.SIGINT else ExitCode.FAILED
            self._kill_within(0, code, "asked to stop for the third time")

    def _ask_to_stop(self, rank: _Rank) -> None:
        if not rank.gone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGTERM)

    # --------------------------------------------------------------------------------------------------- life

    def run(self, logs: Mapping[int, PartSpool]) -> list[EndRecord]:
        """Start the ranks, wait for all of them, return how they ended. `logs` are by rank, where they are kept."""
        self._started = True
        if self._stop_signals:  # raised where Python can only print it, in a destructor
            raise _AskedToStopError(self._stop_signals[0])
        if os.getpid() != 1:  # the end of PID 1 ends its container
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARDIAN],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            for local_rank in range(self._config.nproc_per_node):
                self._start(local_rank, logs)
            for rank in self._ranks if self._stop_signals else ():
                self._ask_to_stop(rank)  # the signal may have come before the rank
            while any(rank.end is None for rank in self._ranks):
                self._turn(min(_TICK_SECONDS, max(0.0, self._deadline - time.monotonic())))
                self._reap()
                self._enforce_deadline()
            drained = time.monotonic() + _DRAIN_SECONDS
            while self._streams() and time.monotonic() < drained:
                self._turn(0.1)
        finally:
            self._clean_up()
        return [rank.record() for rank in self._ranks]

    def _start(self, local_rank: int, logs: Mapping[int, PartSpool]) -> None:
        config = self._config
        number = config.node_rank * config.nproc_per_node + local_rank
        record_file = self._scratch / f"rank-{number}.json"
        environment = {
            "PYTHONUNBUFFERED": "1",  # a rank that is killed must not take its last lines with it
            "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves a stack
            **self._environment,
            records.RANK: str(number),
            records.LOCAL_RANK: str(local_rank),
            records.END_RECORD: str(record_file),
        }
        if number == 0 and self._raw[2]:
            environment[records.TERMINAL_COLUMNS] = str(os.get_terminal_size(2).columns or 80)  # 0: it does not know
        program = [config.module] if _is_file(config.module) else ["-m", config.module]
        command = [sys.executable, *program, *config.arguments]
        pipes = {1: os.pipe(), 2: os.pipe()}
        process = subprocess.Popen(
            dying_with_this_process(command),
            stdin=subprocess.DEVNULL,
            stdout=pipes[1][1],
            stderr=pipes[2][1],
            env=environment,
            start_new_session=True,
        )
        rank = _Rank(number, process, record_file)
        self._ranks.append(rank)
        self._tell_guardian(f"{rank.pid}\n")
        self._oom_kills.watch(rank.pid)
        for target, (reader, writer) in pipes.items():
            os.close(writer)
            stream = RankStream(
                reader,
                screen=self._screens[target],
                prefix=b"" if number == 0 else b"[rank %d] " % number,
                raw=number == 0 and self._raw[target],
                log=logs.get(number),
                last_words=rank.last_words,
            )
            self._selector.register(reader, selectors.EVENT_READ, stream)

    def _streams(self) -> list[RankStream]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _turn(self, timeout: float) -> None:
        """Forward what the ranks have printed, or wait for something to happen."""
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fd, 4096)
            elif not key.data.pump():
                self._selector.unregister(key.fd)
                key.data.close()

    def _reap(self) -> None:
        for rank in self._ranks:
            if not rank.gone:
                self._oom_kills.watch(rank.pid)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:  # to PID 1 come the orphans of the whole container
                for rank in self._ranks:
                    if rank.pid == found[0]:
                        self._ended(rank, os.waitstatus_to_exitcode(found[1]))

    def _ended(self, rank: _Rank, status: int) -> None:
        now = time.time()
        rank.gone = True
        rank.process.returncode = status
        self._kill_group(rank)  # its children end with it
        oom_killed = None
        if status == -signal.SIGKILL and rank.killed is None and self._oom_kills.killed(rank.pid):
            limit = self._oom_kills.limit_bytes(rank.pid)
            known = f"; the limit of its cgroup is {limit / 2**20:.0f} MiB" if limit else ""
            oom_killed = f"ended by the kernel's OOM killer: host memory is used up{known}"
        stop_signal = self._stop_signals[0] if self._stop_signals else None
        seen = Exit(
            rank=rank.rank,
            time=now,
            status=status,
            oom_killed=oom_killed,
            killed=rank.killed,
            stop_signal=stop_signal,
        )
        self._take_end(rank, record_of(seen, rank.left_record()))

    def _take_end(self, rank: _Rank, end: EndRecord) -> None:
        rank.end = end
        if end.code == ExitCode.DONE:
            return
        if end.code != ExitCode.STOPPED and any(other.end is None for other in self._ranks):
            logger.info("rank %d: %s", rank.rank, end)
        if end.code == ExitCode.STOPPED:  # the others may be saving still
            seconds = self._config.save_deadline_seconds
            self._kill_within(seconds, ExitCode.FAILED, f"did not stop within {seconds:g} s after rank {rank.rank}")
        else:
            seconds = self._config.grace_seconds
            reason = f"did not end within {seconds:g} s after rank {rank.rank}"
            self._kill_within(seconds, ExitCode.PEER_LOST, reason)

    # ------------------------------------------------------------------------------------------------ killing

    def _kill_within(self, seconds: float, code: ExitCode, reason: str) -> None:
        if time.monotonic() + seconds < self._deadline:
            self._deadline = time.monotonic() + seconds
            self._deadline_reason = (code, reason)

    def _enforce_deadline(self) -> None:
        late = time.monotonic() - self._deadline
        for rank in self._ranks:
            if rank.end is not None or late < 0:
                continue
            if rank.killed is None:
                code, reason = self._deadline_reason
                message = f"{reason} and was killed by the launcher"
                rank.killed = EndRecord(
                    rank=rank.rank, time=time.time(), code=int(code), reason="killed by the launcher", message=message
                )
                self._kill_group(rank)
            elif late > _KILL_SECONDS:
                message = f"did not end within {_KILL_SECONDS:g} s after SIGKILL; its process {rank.pid} is left behind"
                unhealthy = replace(rank.killed, code=int(ExitCode.NODE_UNHEALTHY), message=message, time=time.time())
                rank.gone = True
                self._take_end(rank, unhealthy)

    def _kill_group(self, rank: _Rank) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses for a group of zombies
            os.killpg(rank.pid, signal.SIGKILL)

    def _tell_guardian(self, line: str) -> None:
        if self._guardian is not None and self._guardian.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guardian.stdin.write(line.encode())
                self._guardian.stdin.flush()

    def _clean_up(self) -> None:
        for rank in self._ranks:
            if rank.end is None:  # an error of the launcher itself
                self._kill_group(rank)
        for stream in self._streams():
            self._selector.unregister(stream.fd)
            stream.close()
        for screen in set(self._screens.values()):
            screen.restore()
        self._tell_guardian("done\n")
        if self._guardian is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guardian.communicate()


# --------------------------------------------------------------------------------------------------- the whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Takes over the signals and the children of this process."""
    err = Screen(2)
    logging.basicConfig(level=logging.WARNING, format="[launcher] %(message)s", stream=err)
    for name in ("opensora", __name__):  # `__main__` after `python -m`
        logging.getLogger(name).setLevel(logging.INFO)
    attempt = None
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, os.environ)
        attempt = config.attempt
        with tempfile.TemporaryDirectory(prefix="opensora-launch-", ignore_cleanup_errors=True) as scratch:
            verdict = _launch(config, scratch=Path(scratch), err=err)
    except _AskedToStopError as stop:
        code = ExitCode.INTERRUPTED if stop.signum == signal.SIGINT else ExitCode.STOPPED
        message = f"asked to stop ({_signal_name(stop.signum)}) before a rank was started"
        verdict = Verdict(code=int(code), message=message, time=time.time(), attempt=attempt)
    except OpenSoraError as error:
        verdict = Verdict(code=int(error.exit_code), message=str(error), time=time.time(), attempt=attempt)
    _write_termination_log(verdict)
    if verdict.code != ExitCode.DONE:
        logger.error("%s", verdict.message)
    return verdict.code


def _launch(config: LaunchConfig, *, scratch: Path, err: Screen) -> Verdict:
    environment = dict(os.environ)
    launcher = Launcher(config, environment=environment, scratch=scratch, err=err)
    launcher.listen()
    run, attempt = None, config.attempt
    if config.run_uri is not None:
        from opensora.storage import Storage  # takes longer to import than a launch without a run directory takes

        run = Storage(config.run_uri)
        attempt = records.enter_attempt(run, attempt)
        environment[records.RUN_URI] = run.uri
        ranks = "1 rank" if config.world_size == 1 else f"{config.world_size} ranks"
        logger.info("attempt %d of %s, %s", attempt, run.uri, ranks)
    if attempt is not None:
        environment[records.ATTEMPT] = str(attempt)
    if config.node_rank > 0:
        _wait_for_name(config.master_addr, seconds=config.rendezvous_seconds)
    port = config.master_port or (free_port(config.master_addr) if config.nnodes == 1 else _MULTI_NODE_PORT)
    environment |= {
        records.WORLD_SIZE: str(config.world_size),
        records.LOCAL_WORLD_SIZE: str(config.nproc_per_node),
        records.MASTER_ADDR: config.master_addr,
        records.MASTER_PORT: str(port),
    }
    logs = _open_logs(run, attempt, config) if run is not None and attempt is not None else {}
    try:
        ends = launcher.run(logs)
    finally:
        if logs:
            with ThreadPoolExecutor(len(logs)) as closing:  # each may wait for the store
                list(closing.map(lambda log: log.close(), logs.values()))
    verdict = records.judge(ends, attempt=attempt, now=time.time())
    if config.run_uri is not None and attempt is not None:
        _publish(config.run_uri, attempt, ends, verdict)
    return verdict


def _open_logs(run: Storage, attempt: int, config: LaunchConfig) -> dict[int, PartSpool]:
    from opensora.config.train import ReportConfig
    from opensora.spool import PartSpool

    first = config.node_rank * config.nproc_per_node
    return {
        rank: PartSpool(run, records.log_prefix(attempt, rank), suffix=".log", flush_seconds=ReportConfig.flush_seconds)
        for rank in range(first, first + config.nproc_per_node)
    }


def _publish(run_uri: str, attempt: int, ends: Sequence[EndRecord], verdict: Verdict) -> None:
    """Write the ranks' end records and the verdict. With several machines the last one's verdict sees all records."""
    from opensora.config.train import StorageConfig
    from opensora.storage import Storage

    run = Storage(run_uri, config=StorageConfig(retry_deadline_seconds=_PUBLISH_SECONDS))
    try:
        for end in ends:
            run.write(records.rank_record_path(attempt, end.rank), end.to_json().encode())
        known = {end.rank: end for end in ends}
        while True:
            run.write(records.verdict_path(attempt), verdict.to_json().encode())
            everywhere = records.read_end_records(run, attempt)
            if everywhere.keys() <= known.keys():
                break
            known |= everywhere
            verdict = records.judge(known.values(), attempt=attempt, now=time.time())
    except StorageError as error:
        logger.warning("the end of attempt %d is not in the run directory: %s", attempt, error)


def _write_termination_log(verdict: Verdict) -> None:
    given = os.environ.get("OPENSORA_TERMINATION_LOG")
    path = Path(given or "/dev/termination-log")
    if given is None and not path.exists():
        return
    try:
        path.write_bytes(termination_message(verdict))
    except OSError as error:
        logger.warning("the termination message is not written: %s", error)


def _wait_for_name(host: str, *, seconds: float) -> None:
    """Wait until machine 0 has an address. Its port opens later, when rank 0 has loaded its program; to wait for that
    as well would make the machines start one after the other, and the ranks themselves try until their own timeout.

    Raises:
        PeerLostError: the name does not resolve in time.
    """
    end = time.monotonic() + seconds
    announced = False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > end:
                raise PeerLostError(
                    f"the name of machine 0, {host}, does not resolve after {seconds:g} s: {error}",
                    hint="see whether machine 0 has started; a headless Service must publish addresses that are not "
                    "ready yet (publishNotReadyAddresses)",
                ) from error
            if not announced:
                logger.info("waiting up to %g s for the name of machine 0, %s, to resolve", seconds, host)
                announced = True
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))


def free_port(host: str) -> int:
    """A port on an address of this machine that nothing listens on, now. Raises UsageError where there is none."""
    for port in random.sample(_FREE_PORTS, 100):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, port))
            return port
    raise UsageError(f"no free port on --master-addr {host}", hint="give an address of this machine, or --master-port")


if __name__ == "__main__":
    sys.exit(main())
