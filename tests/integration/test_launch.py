"""The launcher with real processes: every exit code, signals, kills, output, and what is left in the run directory.

The ranks are small programs without torch. Where they stand in for training they talk over a socket at
`MASTER_ADDR:MASTER_PORT`, so that a lost peer is a real one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from opensora import records
from opensora.errors import ExitCode
from opensora.records import EndRecord, Verdict
from opensora.storage import Storage

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_SECONDS = 60.0

PRELUDE = """
import os, signal, socket, subprocess, sys, threading, time
from opensora import errors, records

rank = int(os.environ["RANK"])


def say(*words):
    print(*words, flush=True)


def end(error, **where):
    record = records.EndRecord.from_exception(error, rank=rank, **where)
    records.write_end_record(record)
    sys.exit(int(record.code))


def connect():
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.create_server(address) as server:
            return [server.accept()[0] for _ in range(int(os.environ["WORLD_SIZE"]) - 1)]
    while True:
        try:
            return [socket.create_connection(address)]
        except ConnectionRefusedError:
            time.sleep(0.01)


def collective(peers):
    # Returns when all peers have sent a byte; a peer that is gone ends this rank with 84, as it would in training.
    for peer in peers:
        peer.sendall(b".")
    for peer in peers:
        try:
            gone = not peer.recv(1)
        except ConnectionResetError:
            gone = True
        if gone:
            end(errors.PeerLostError("connection closed by peer"), phase="forward/backward", step=7)
"""


@dataclass
class Launched:
    """A running or finished launcher."""

    process: subprocess.Popen[bytes]
    run: Storage
    folder: Path
    out: bytes = b""
    err: bytes = b""
    seen: list[str] = field(default_factory=list)

    def wait_for(self, *words: str) -> None:
        """Read standard output until each of these has appeared at the start of a line (after the rank's prefix)."""
        assert self.process.stdout is not None
        missing = set(words)
        while missing:
            line = self.process.stdout.readline()
            assert line, f"the launcher ended without saying {missing}"
            self.out += line
            self.seen.append(line.decode().strip())
            missing -= {line.decode().strip()}

    def finish(self) -> int:
        out, self.err = self.process.communicate(timeout=TIMEOUT_SECONDS)
        self.out += out or b""
        return self.process.returncode

    @property
    def last_line(self) -> str:
        return self.err.decode().splitlines()[-1]

    @property
    def verdict(self) -> Verdict:
        return Verdict.from_json(self.run.read(records.verdict_path(1)))

    def ended(self, rank: int) -> EndRecord:
        return EndRecord.from_json(self.run.read(records.rank_record_path(1, rank)))

    def log(self, rank: int) -> bytes:
        parts = self.run.list(records.log_prefix(1, rank))
        return b"".join(self.run.read(part.path) for part in parts)


Start = Callable[..., Launched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the launcher on a program: `start(source, *options, before=[…], run=True)`."""
    running: list[Launched] = []

    def begin(source: str, *options: str, ranks: int = 2, before: tuple[str, ...] = (), run: bool = True) -> Launched:
        (tmp_path / "program.py").write_text(PRELUDE + textwrap.dedent(source))
        run_uri = str(tmp_path / "run")
        options = (f"--nproc-per-node={ranks}", *([f"--run-uri={run_uri}"] if run else []), *options)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENSORA_")}
        environment["PYTHONPATH"] = str(REPOSITORY)
        environment["OPENSORA_TERMINATION_LOG"] = str(tmp_path / "termination-log")
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "opensora.launch", *options, "program"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        running.append(Launched(process, Storage(run_uri), tmp_path))
        return running[-1]

    yield begin
    for launched in running:
        if launched.process.poll() is None:
            launched.process.kill()
        launched.process.communicate()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


# -------------------------------------------------------------------------------------------------- exit codes

CAUSES = {
    ExitCode.USAGE: 'end(errors.UsageError("no config given"))',
    ExitCode.DATA: 'end(errors.DataError("a.mp4 is truncated"), phase="data wait", step=3, samples=["a.mp4"])',
    ExitCode.CONFIG: 'end(errors.ConfigError("model.depth=-1", hint="use 1"), phase="start-up")',
    ExitCode.STALLED: """
        def watch():
            error = errors.StalledError("no step")
            records.write_end_record(records.EndRecord.from_exception(error, rank=rank, step=4))
            os._exit(85)
        threading.Timer(0.1, watch).start()
        time.sleep(60)
        """,
    ExitCode.DIVERGED: 'end(errors.DivergedError("loss is nan"), phase="forward/backward", bucket="144p/51/0.56")',
    ExitCode.NODE_UNHEALTHY: 'end(errors.NodeUnhealthyError("GPU 3 has uncorrectable errors"))',
    ExitCode.FAILED: "1 / 0",
}


@pytest.mark.parametrize("code", CAUSES, ids=lambda code: code.name)
def test_the_launcher_ends_with_the_code_of_the_rank_that_failed(start: Start, code: ExitCode) -> None:
    cause = textwrap.indent(textwrap.dedent(CAUSES[code]), "    ")
    launched = start(f"peers = connect()\nif rank == 1:\n{cause}\ncollective(peers)\n")
    assert launched.finish() == code
    assert f"rank 1 failed first: {records.MEANINGS[code]} ({code:d})" in launched.last_line
    assert (launched.verdict.code, launched.verdict.codes) == (code, {"0": 84, "1": code})
    assert launched.verdict.first == launched.ended(1)


def test_all_ranks_done_is_zero_and_quiet(start: Start) -> None:
    launched = start('collective(connect()); say("done")')
    assert launched.finish() == 0
    assert sorted(launched.out.splitlines()) == [b"[rank 1] done", b"done"]
    assert (launched.verdict.code, launched.verdict.first, launched.verdict.codes) == (0, None, {"0": 0, "1": 0})
    assert [line for line in launched.err.splitlines() if b"attempt 1 of" not in line] == []


def test_a_rank_that_fails_before_it_can_record_it_leaves_its_traceback(start: Start) -> None:
    launched = start("if rank == 1: import no_such_module\ntime.sleep(60)", "--grace-seconds=0.2")
    assert launched.finish() == 1
    assert launched.last_line == "[launcher] rank 1 failed first: failed (1): exit status 1"
    assert launched.ended(1).last_words[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_a_status_outside_the_contract_is_a_plain_failure(start: Start) -> None:
    launched = start("sys.exit(42)", ranks=1)
    assert launched.finish() == 1
    assert "exit status 42" in launched.last_line


def test_a_killed_rank_is_named_and_not_the_peers_that_lost_it(start: Start) -> None:
    launched = start(
        "peers = connect()\nif rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ncollective(peers)", ranks=3
    )
    assert launched.finish() == 1
    assert launched.last_line == "[launcher] rank 1 failed first: failed (1): killed by SIGKILL"
    assert launched.verdict.codes["0"] == 84


def test_the_earlier_failure_is_named_though_its_process_ends_later(start: Start) -> None:
    launched = start(
        """
        if rank == 1:
            records.write_end_record(records.EndRecord.from_exception(errors.DivergedError("loss is nan"), rank=1))
            say("recorded")
            time.sleep(0.5)
            sys.exit(87)
        time.sleep(0.3)
        end(errors.DataError("a consequence"))
        """
    )
    assert launched.finish() == 87
    assert "rank 1 failed first: diverged (87): loss is nan" in launched.last_line


def test_ranks_that_lost_a_peer_on_another_machine_give_84(start: Start) -> None:
    launched = start('end(errors.PeerLostError("connection closed by peer"))')
    assert launched.finish() == 84


def test_the_cause_reaches_the_termination_message(start: Start) -> None:
    launched = start('end(errors.DataError("a.mp4 is truncated"), samples=["a.mp4"] * 1000)', ranks=1)
    launched.finish()
    text = (launched.folder / "termination-log").read_bytes()
    assert len(text) <= 4096
    first = Verdict.from_json(text).first
    assert first is not None
    assert (first.code, first.message) == (65, "a.mp4 is truncated")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc-per-node=0", "program"], "--nproc-per-node 0 is below 1"),
        (["--nproc-per-node=x", "program"], "invalid int value: 'x'"),
        (["--no-such-option", "program"], "unrecognized arguments|required"),
        ([], "module"),
        (["no_such_program.main"], "there is no module no_such_program.main"),
        (["no_such_file.py"], "there is no file no_such_file.py"),
        (["--nnodes=2", "--node-rank=2", "program"], "--node-rank 2 with --nnodes 2"),
        (["--nnodes=2", "--run-uri=run", "program"], "no --attempt"),
    ],
)
def test_a_wrong_command_line_is_64(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "program.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "opensora.launch", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 64
    assert re.search(words, done.stderr.decode())
    assert b"Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------- attempts


def test_every_start_is_a_new_attempt(start: Start) -> None:
    for attempt in (1, 2):
        launched = start('say("attempt", os.environ["OPENSORA_ATTEMPT"], os.environ["OPENSORA_RUN_URI"])', ranks=1)
        assert launched.finish() == 0
        assert launched.out.decode() == f"attempt {attempt} {launched.run.uri}\n"
    assert records.newest_attempt(launched.run) == 2


def test_a_rank_of_an_older_attempt_ends_with_89(start: Start) -> None:
    launched = start(
        """
        from opensora.storage import Storage
        peers = connect()
        run = Storage(os.environ["OPENSORA_RUN_URI"])
        if rank == 1:
            records.announce_attempt(run, 2)
        try:
            collective(peers)
            records.check_not_superseded(run, int(os.environ["OPENSORA_ATTEMPT"]))
        except errors.SupersededError as error:
            end(error)
        """
    )
    assert launched.finish() == 89
    assert "superseded by a newer attempt (89)" in launched.last_line


def test_an_older_attempt_is_not_even_started(start: Start, tmp_path: Path) -> None:
    records.announce_attempt(Storage(str(tmp_path / "run")), 3)
    launched = start('say("started")', "--attempt=2")
    assert launched.finish() == 89
    assert launched.out == b""
    assert b"attempt 2 of" in launched.err
    assert b"superseded by attempt 3" in launched.err


# ------------------------------------------------------------------------------------------------------ signals

SAVES = """
    signal.signal(signal.SIGTERM, lambda *_: end(errors.StopRequestedError("checkpoint of step 9 is saved"), step=9))
    say("ready")
    time.sleep(60)
    """


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_a_stop_is_forwarded_and_the_ranks_may_save(start: Start, signum: signal.Signals) -> None:
    launched = start(SAVES)
    launched.wait_for("ready", "[rank 1] ready")
    launched.process.send_signal(signum)
    assert launched.finish() == 75
    assert launched.verdict.codes == {"0": 75, "1": 75}
    assert "stopped on request (75) at step 9: checkpoint of step 9 is saved" in launched.last_line


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_ranks_that_were_stopped_before_they_could_save_lose_nothing(
    start: Start, signum: signal.Signals, code: int
) -> None:
    launched = start('say("ready"); time.sleep(60)')
    launched.wait_for("ready", "[rank 1] ready")
    launched.process.send_signal(signum)
    assert launched.finish() == code
    assert "the newest checkpoint stays" in launched.last_line


def test_ranks_that_ignore_sigterm_are_killed_at_the_deadline(start: Start) -> None:
    launched = start(
        'signal.signal(signal.SIGTERM, signal.SIG_IGN); say("ready"); time.sleep(60)', "--save-deadline-seconds=0.5"
    )
    launched.wait_for("ready", "[rank 1] ready")
    launched.process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert launched.finish() == 1
    assert 0.4 < time.monotonic() - begun < 5
    assert "did not stop within 0.5 s after SIGTERM and was killed by the launcher" in launched.last_line


def test_a_save_that_takes_long_may_finish_before_the_deadline(start: Start) -> None:
    launched = start(SAVES.replace("lambda *_: end", "lambda *_: time.sleep(1.5) or end"), "--grace-seconds=0.1")
    launched.wait_for("ready", "[rank 1] ready")
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish() == 75


def test_a_rank_that_has_saved_leaves_the_others_time_to_save(start: Start) -> None:
    launched = start(SAVES.replace("lambda *_: end", "lambda *_: time.sleep(1.0 * rank) or end"), "--grace-seconds=0.1")
    launched.wait_for("ready", "[rank 1] ready")
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish() == 75
    assert launched.verdict.codes == {"0": 75, "1": 75}


def test_every_further_sigterm_reaches_the_ranks_and_the_third_ends_them(start: Start) -> None:
    launched = start(
        """
        signal.signal(signal.SIGTERM, lambda *_: say("asked"))
        say("ready")
        while True:
            time.sleep(1)
        """,
        ranks=1,
    )
    launched.wait_for("ready")
    for _ in range(2):
        launched.process.send_signal(signal.SIGTERM)
        launched.wait_for("asked")
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish() == 1
    assert "asked to stop for the third time" in launched.last_line


def test_a_stop_while_waiting_for_another_machine_ends_at_once(start: Start) -> None:
    launched = start("", "--nnodes=2", "--node-rank=1", "--attempt=1", "--master-addr=nowhere.invalid")
    assert launched.process.stderr is not None
    while b"waiting" not in launched.process.stderr.readline():
        pass
    launched.process.send_signal(signal.SIGTERM)
    assert launched.finish() == 75


def test_ranks_that_do_not_notice_a_failure_are_killed_after_the_grace_period(start: Start) -> None:
    launched = start('if rank == 0: end(errors.DataError("x"))\ntime.sleep(60)', "--grace-seconds=0.5", ranks=3)
    assert launched.finish() == 65
    assert launched.verdict.codes == {"0": 65, "1": 84, "2": 84}
    assert launched.ended(2).message == "did not end within 0.5 s after rank 0 and was killed by the launcher"


# -------------------------------------------------------------------------------------------- nothing left behind

WITH_CHILD = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
say(os.getpid(), child.pid)
"""


def pids_of(launched: Launched, ranks: int) -> list[int]:
    assert launched.process.stdout is not None
    lines = [launched.process.stdout.readline().decode() for _ in range(ranks)]
    return [int(word) for line in lines for word in line.replace("[rank 1]", "").split()]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_a_killed_launcher_leaves_neither_ranks_nor_their_children(start: Start) -> None:
    launched = start(WITH_CHILD + "time.sleep(600)")
    pids = pids_of(launched, 2)
    assert len(pids) == 4
    assert all(is_running(pid) for pid in pids)
    launched.process.kill()
    assert wait_until(lambda: not any(is_running(pid) for pid in pids))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_ranks_end_with_a_launcher_whose_guardian_was_killed_before(start: Start) -> None:
    launched = start("say(os.getpid()); time.sleep(600)")
    ranks = pids_of(launched, 2)
    children = Path(f"/proc/{launched.process.pid}/task/{launched.process.pid}/children")
    if not children.exists():
        pytest.skip("this kernel does not list the children of a process")
    others = {int(pid) for pid in children.read_text().split()} - set(ranks)
    assert others, "the guardian"
    for pid in others:
        os.kill(pid, signal.SIGKILL)
    launched.process.kill()
    assert wait_until(lambda: not any(is_running(pid) for pid in ranks))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", ["done", "failed", "killed"])
def test_children_end_with_their_rank(start: Start, how: str) -> None:
    cause = {"done": "", "failed": "sys.exit(1)", "killed": "os.kill(os.getpid(), signal.SIGKILL)"}[how]
    launched = start(WITH_CHILD + cause)
    pids = pids_of(launched, 2)
    assert len(pids) == 4
    assert launched.finish() == (0 if how == "done" else 1)
    assert not any(is_running(pid) for pid in pids)


def test_as_pid_1_it_reaps_orphans(start: Start) -> None:
    isolated = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("making a PID namespace needs root")
    launched = start(
        """
        assert os.getppid() == 1
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(0.2)  # outlives its parent, so it is an orphan when it ends
            os._exit(0)
        os.wait()
        time.sleep(0.5)
        def states():
            for name in filter(str.isdigit, os.listdir("/proc")):
                try:
                    yield open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[0]
                except OSError:
                    pass
        deadline = time.monotonic() + 5
        while "Z" in states() and time.monotonic() < deadline:
            time.sleep(0.1)
        say("zombies:", "Z" in states())
        end(errors.DataError("x"))
        """,
        ranks=1,
        before=isolated,
    )
    assert launched.finish() == 65
    assert b"zombies: False" in launched.out


# ------------------------------------------------------------------------------------------------------- memory


EATS_MEMORY = """
    memory = []
    while len(memory) < 400:
        memory.append(b"x" * 4 * 2**20)
    say("too much memory here")
    """


def test_a_rank_that_the_oom_killer_ends_is_86(start: Start, small_cgroup: Path) -> None:
    enter = ("sh", "-c", f'echo $$ > {small_cgroup}/cgroup.procs; exec "$@"', "sh")
    source = f"peers = connect()\nif rank == 1:{EATS_MEMORY}\ncollective(peers)"
    launched = start(source, before=enter)
    assert launched.finish() == 86
    assert "rank 1 failed first: out of memory (86)" in launched.last_line
    assert "the limit of its cgroup is 160 MiB" in launched.last_line
    assert launched.verdict.codes == {"0": 84, "1": 86}


def test_a_rank_in_a_cgroup_of_its_own_is_seen_there(start: Start, small_cgroup: Path) -> None:
    launched = start(
        f"""
        open("{small_cgroup}/cgroup.procs", "w").write(str(os.getpid()))
        time.sleep(2.5)
        """
        + textwrap.indent(textwrap.dedent(EATS_MEMORY), "        "),
        ranks=1,
    )
    assert launched.finish() == 86


def test_a_kill_by_hand_in_the_same_cgroup_is_not_called_out_of_memory(start: Start, small_cgroup: Path) -> None:
    enter = ("sh", "-c", f'echo $$ > {small_cgroup}/cgroup.procs; exec "$@"', "sh")
    launched = start("os.kill(os.getpid(), signal.SIGKILL)", ranks=1, before=enter)
    assert launched.finish() == 1


# ------------------------------------------------------------------------------------------------------- output


def test_output_is_forwarded_and_kept(start: Start) -> None:
    launched = start('say("to out"); print("to err", file=sys.stderr); sys.stdout.write("no newline at the end")')
    assert launched.finish() == 0
    assert sorted(launched.out.splitlines()) == [
        b"[rank 1] no newline at the end",
        b"[rank 1] to out",
        b"no newline at the end",
        b"to out",
    ]
    assert {b"to err", b"[rank 1] to err"} <= set(launched.err.splitlines())
    for rank in (0, 1):
        assert sorted(launched.log(rank).splitlines()) == [b"no newline at the end", b"to err", b"to out"]


def test_lines_of_many_ranks_stay_whole_and_in_order(start: Start) -> None:
    launched = start('for i in range(2000): print(rank, i, "x" * 100)', ranks=3)
    assert launched.finish() == 0
    lines = launched.out.decode().splitlines()
    for rank in range(3):
        prefix = f"[rank {rank}] " if rank else ""
        mine = [line for line in lines if re.match(rf"{re.escape(prefix)}{rank} \d+ x", line)]
        assert mine == [f"{prefix}{rank} {i} {'x' * 100}" for i in range(2000)]
    assert len(lines) == 6000


def test_a_killed_rank_does_not_take_its_last_lines_with_it(start: Start) -> None:
    launched = start('print("last words"); os.kill(os.getpid(), signal.SIGKILL)', ranks=1)
    assert launched.finish() == 1
    assert launched.out == b"last words\n"
    assert launched.ended(0).last_words == ["last words"]


def test_binary_and_endless_lines_pass(start: Start) -> None:
    launched = start(
        """
        sys.stdout.buffer.write(bytes(b for b in range(256) if b != 10) + b"\\n")
        sys.stdout.buffer.write(b"yes" * 400_000 + b"\\n")
        """,
        ranks=1,
    )
    assert launched.finish() == 0
    assert launched.out.startswith(bytes(b for b in range(256) if b != 10) + b"\n")
    assert launched.out.partition(b"\n")[2].replace(b"\n", b"") == b"yes" * 400_000
    assert launched.log(0).partition(b"\n")[2].replace(b"\n", b"") == b"yes" * 400_000


def test_a_rank_may_close_its_output(start: Start) -> None:
    launched = start("os.close(1); os.close(2); time.sleep(0.3); os._exit(65)", ranks=1)
    assert launched.finish() == 65


def test_output_that_comes_after_the_end_of_the_rank_is_kept(start: Start) -> None:
    launched = start(
        """
        late = "import time; time.sleep(0.5); print('late words')"
        subprocess.Popen([sys.executable, "-c", late], start_new_session=True)
        """,
        ranks=1,
    )
    assert launched.finish() == 0
    assert launched.out == b"late words\n"


def test_a_process_that_keeps_the_output_open_does_not_hold_the_launcher(start: Start, tmp_path: Path) -> None:
    launched = start(
        """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        say(child.pid)
        """,
        ranks=1,
    )
    begun = time.monotonic()
    assert launched.process.wait(timeout=TIMEOUT_SECONDS) == 0
    assert time.monotonic() - begun < 15
    assert launched.process.stdout is not None
    os.kill(int(launched.process.stdout.readline()), signal.SIGKILL)


def test_the_run_goes_on_when_nobody_reads_its_output_any_more(start: Start) -> None:
    launched = start(
        """
        for i in range(20_000):
            say("x" * 100)
        open("finished", "w").close()
        """,
        ranks=1,
    )
    assert launched.process.stdout is not None
    launched.process.stdout.readline()
    launched.process.stdout.close()
    launched.process.stdout = None
    assert launched.finish() == 0
    assert (launched.folder / "finished").exists()
    assert launched.log(0).count(b"\n") == 20_000


def test_on_a_terminal_rank_0_draws_and_the_log_keeps_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        PRELUDE
        + textwrap.dedent(
            """
            if rank == 0:
                sys.stderr.write("\\x1b[?25l")
                for i in range(5):
                    sys.stderr.write(f"\\r\\x1b[2Kstep {i} ####")
                    sys.stderr.flush()
                    time.sleep(0.02)
                sys.stderr.write("\\r\\x1b[2K\\x1b[32mcheckpoint saved\\x1b[0m\\nstep 5 #####")
                say("columns", os.environ.get("OPENSORA_TERMINAL_COLUMNS"))
            else:
                say("columns", os.environ.get("OPENSORA_TERMINAL_COLUMNS"))
            """
        )
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 123, 0, 0))
    command = [sys.executable, "-m", "opensora.launch", "--nproc-per-node=2", "--run-uri=run", "program"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while data := os.read(master, 65536):
            shown += data
    os.close(master)
    out, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == [b"[rank 1] columns None", b"columns 123"]
    assert b"\r\x1b[2Kstep 3 ####" in shown
    assert shown.rstrip().endswith(b"\x1b[?25h"), "the cursor is visible again"
    log = Storage(str(tmp_path / "run")).read("logs/attempt-1/rank-0/part-00000.log")
    assert sorted(log.splitlines()) == [b"checkpoint saved", b"columns 123", b"step 5 #####"]


# ------------------------------------------------------------------------------------------------ several machines


def test_two_launchers_make_one_world(start: Start, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    source = """
        collective(connect())
        say("of", os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"])
        sys.exit(65 if rank == 1 else 0)
        """
    shared = ("--nnodes=2", "--attempt=1", f"--master-port={port}")
    first = start(source, *shared, "--node-rank=0", ranks=1)
    second = start(source, *shared, "--node-rank=1", "--master-addr=localhost", ranks=1)
    assert (first.finish(), second.finish()) == (0, 65)
    assert (first.out, second.out) == (b"of 2 0\n", b"[rank 1] of 2 0\n")
    assert first.verdict.codes == {"0": 0, "1": 65}
    assert first.verdict.code == 65


def test_a_name_that_never_resolves_is_a_lost_peer(start: Start) -> None:
    options = (
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=nowhere.invalid",
        "--rendezvous-seconds=0.5",
        "--attempt=1",
    )
    launched = start('say("started")', *options)
    assert launched.finish() == 84
    assert launched.out == b""
    assert b"the name of machine 0, nowhere.invalid, does not resolve after 0.5 s" in launched.err


# -------------------------------------------------------------------------------------------------- object store


def test_a_run_directory_in_a_bucket_gets_logs_records_and_verdict(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PRELUDE + 'say("hello"); end(errors.DataError("a.mp4 is truncated"))')
    done = subprocess.run(
        [sys.executable, "-m", "opensora.launch", f"--run-uri=s3://{bucket}/runs/a", "program"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 65, done.stderr
    run = Storage(f"s3://{bucket}/runs/a")
    assert Verdict.from_json(run.read("attempts/1/end.json")).code == 65
    assert EndRecord.from_json(run.read("attempts/1/rank-0.json")).message == "a.mp4 is truncated"
    assert json.loads(run.read("attempts/1/started.json"))["attempt"] == 1
    assert run.read("logs/attempt-1/rank-0/part-00000.log") == b"hello\n"


def test_a_bucket_that_does_not_exist_is_a_wrong_configuration(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "opensora.launch", "--run-uri=s3://no-such-bucket-here/run", "program"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 78
    assert b"no-such-bucket-here" in done.stderr
