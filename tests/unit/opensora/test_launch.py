"""The launcher's decisions: what the end of a process means, which settings hold, what Kubernetes is told."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opensora import launch, records
from opensora.errors import ExitCode, PeerLostError, UsageError
from opensora.launch import Exit, Launcher, parse, record_of, termination_message
from opensora.rank_output import Screen
from opensora.records import EndRecord, Verdict

KILLED = EndRecord(rank=1, time=9, code=84, reason="killed by the launcher", message="did not end")


def left(code: int) -> EndRecord:
    """The record that a rank wrote itself."""
    return EndRecord(rank=1, time=3, code=code, reason="Error", message="its own words")


@pytest.mark.parametrize(
    ("status", "wrote", "circumstances", "code"),
    [
        (0, None, {}, 0),
        (0, left(0), {}, 0),
        (86, left(86), {}, 86),
        (1, left(87), {}, 87),
        (0, left(87), {}, 87),
        (-11, left(75), {}, 75),
        (-9, left(84), {"killed": KILLED}, 84),
        (-9, left(86), {"killed": KILLED}, 86),
        (-11, left(0), {}, 1),
        (3, left(0), {}, 1),
        (1, None, {}, 1),
        (65, None, {}, 65),
        (42, None, {}, 1),
        (42, left(42), {}, 1),
        (-9, None, {}, 1),
        (-9, None, {"oom_killed": "limit"}, 86),
        (-9, None, {"killed": KILLED}, 84),
        (-9, None, {"killed": KILLED, "oom_killed": "limit"}, 84),
        (-11, None, {"killed": KILLED}, 1),
        (-11, None, {"oom_killed": "limit"}, 1),
        (-15, None, {}, 1),
        (-15, None, {"stop_signal": 15}, 75),
        (-15, None, {"stop_signal": 2}, 130),
        (-11, None, {"stop_signal": 15}, 1),
        (-9, None, {"stop_signal": 15}, 1),
        (1, None, {"stop_signal": 2}, 1),
    ],
    ids=[
        "done",
        "done and says so",
        "its record",
        "the record is the cause, the status a consequence",
        "a failure that was swallowed",
        "a crash after the checkpoint was saved",
        "lost peer, did not end by itself",
        "failed, did not end by itself",
        "a crash after success is a failure",
        "a failing exit after success is a failure",
        "exception",
        "a code of the contract",
        "a code outside the contract",
        "a record outside the contract",
        "killed by someone",
        "killed for memory",
        "killed by the launcher",
        "killed by the launcher while another was killed for memory",
        "crashed just before the launcher could kill it",
        "only SIGKILL is the OOM killer's",
        "SIGTERM from elsewhere",
        "stopped before it could save",
        "interrupted before it could save",
        "a crash while stopping",
        "killed while stopping",
        "a failure while stopping",
    ],
)
def test_what_the_end_of_a_rank_means(
    status: int, wrote: EndRecord | None, circumstances: dict[str, object], code: int
) -> None:
    seen = replace(Exit(rank=1, time=5, status=status), **circumstances)  # type: ignore[arg-type]  # a table
    end = record_of(seen, wrote)
    assert (end.rank, end.code) == (1, code)


def test_the_time_of_a_failure_is_the_one_that_the_rank_wrote() -> None:
    assert record_of(Exit(rank=1, time=5, status=87), left(87)).time == 3
    assert record_of(Exit(rank=1, time=5, status=-9), None).time == 5


def test_a_record_of_another_rank_is_not_taken_for_granted() -> None:
    assert record_of(Exit(rank=4, time=5, status=87), left(87)).rank == 4


@pytest.mark.parametrize(("status", "words"), [(-11, "killed by SIGSEGV"), (-63, "killed by signal 63")])
def test_a_signal_is_named(status: int, words: str) -> None:
    assert words in str(record_of(Exit(rank=0, time=5, status=status), None))


# ----------------------------------------------------------------------------------------------------- settings

HERE = ["json"]  # a module that exists


def test_flags_are_read_up_to_the_module_and_the_rest_is_its_own() -> None:
    config = parse(["--nproc-per-node", "2", "json", "cfg.yaml", "--nproc-per-node", "9", "train.steps=5"], {})
    assert (config.nproc_per_node, config.module) == (2, "json")
    assert config.arguments == ("cfg.yaml", "--nproc-per-node", "9", "train.steps=5")


def test_the_environment_fills_in_and_flags_win() -> None:
    environment = {"OPENSORA_NPROC_PER_NODE": "3", "OPENSORA_ATTEMPT": "7", "OPENSORA_GRACE_SECONDS": "2.5"}
    config = parse(["--nproc-per-node=4", *HERE], environment)
    assert (config.nproc_per_node, config.attempt, config.grace_seconds) == (4, 7, 2.5)


@pytest.mark.parametrize(
    ("arguments", "environment", "node_rank"),
    [
        (["--nnodes=3"], {"JOB_COMPLETION_INDEX": "2"}, 2),
        ([], {"JOB_COMPLETION_INDEX": "2"}, 0),
        (["--nnodes=3"], {"JOB_COMPLETION_INDEX": "2", "OPENSORA_NODE_RANK": "1"}, 1),
        (["--nnodes=3", "--node-rank=1"], {"JOB_COMPLETION_INDEX": "2"}, 1),
        (["--nnodes=3", "--node-rank=0"], {"JOB_COMPLETION_INDEX": "2"}, 0),
    ],
    ids=["indexed job", "one machine", "variable wins", "flag wins", "flag 0 wins"],
)
def test_the_number_of_the_machine(arguments: list[str], environment: dict[str, str], node_rank: int) -> None:
    assert parse([*arguments, *HERE], environment).node_rank == node_rank


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attempt=0"], "--attempt 0 is below 1"),
        (["--grace-seconds=-1"], "--grace-seconds -1.0 is no duration"),
        (["--save-deadline-seconds=inf"], "is no duration"),
        (["--grace-seconds=nan"], "is no duration"),
        (["--master-port=70000"], "--master-port 70000 is no port"),
        (["--node-rank=1"], "--node-rank 1 with --nnodes 1"),
    ],
)
def test_an_impossible_setting_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        parse([*arguments, *HERE], {})
    assert caught.value.hint


def test_a_wrong_variable_is_refused_like_a_wrong_flag() -> None:
    with pytest.raises(UsageError, match="invalid int value: 'two'"):
        parse(HERE, {"OPENSORA_NNODES": "two"})


def test_a_program_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    assert parse([str(tmp_path / "train.py")], {}).module.endswith("train.py")
    with pytest.raises(UsageError, match="there is no file"):
        parse([str(tmp_path / "other.py")], {})


# ------------------------------------------------------------------------------------------------------- others


def test_a_stop_before_the_ranks_start_passes_by_whatever_handles_errors(tmp_path: Path) -> None:
    launcher = Launcher(parse(HERE, {}), environment={}, scratch=tmp_path, err=Screen(2))
    with pytest.raises(launch._AskedToStopError), contextlib.suppress(Exception):
        launcher._on_stop(signal.SIGTERM, None)
    with pytest.raises(launch._AskedToStopError):  # and is not forgotten where it could not be raised
        launcher.run({})


def test_a_free_port_is_not_one_that_outgoing_connections_take() -> None:
    port = launch.free_port("127.0.0.1")
    assert 1024 <= port < 32768
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_an_address_that_is_not_ours_has_no_free_port() -> None:
    with pytest.raises(UsageError, match=r"192\.0\.2\.1"):  # reserved for documentation, RFC 5737
        launch.free_port("192.0.2.1")


def test_a_name_that_does_not_resolve_is_a_lost_peer() -> None:
    with pytest.raises(PeerLostError, match=r"nowhere\.invalid"):
        launch._wait_for_name("nowhere.invalid", seconds=0)


@pytest.mark.parametrize("huge", ["last_words", "samples", "message", "verdict message", "codes", "everything"])
def test_the_termination_message_is_valid_and_short_whatever_was_said(huge: str) -> None:
    many = ["ü" * 200] * 100
    first = EndRecord(
        rank=1,
        time=1,
        code=86,
        reason="OutOfMemoryError",
        message="m" * 9000 if huge in ("message", "everything") else "m",
        last_words=many if huge in ("last_words", "everything") else ["the end"],
        samples=many if huge in ("samples", "everything") else [],
    )
    verdict = Verdict(
        code=86,
        message="v" * 9000 if huge in ("verdict message", "everything") else "v",
        time=2,
        first=first,
        codes={str(rank): 84 for rank in range(600)} if huge in ("codes", "everything") else {},
    )
    data = termination_message(verdict)
    assert len(data) <= 4096
    told = Verdict.from_json(data)
    assert (told.code, told.message[0]) == (86, "v")
    assert told.first is not None
    assert (told.first.rank, told.first.code) == (1, 86)
    if huge == "last_words":
        assert told.first.last_words
        assert told.first.last_words == many[: len(told.first.last_words)]


def test_a_short_termination_message_is_the_whole_verdict() -> None:
    verdict = records.judge([left(86)], attempt=2, now=4)
    assert Verdict.from_json(termination_message(verdict)) == verdict


def test_the_launcher_starts_without_torch_or_object_stores() -> None:
    code = "import sys, opensora.launch; print({'torch', 'fsspec', 's3fs', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_page_of_exit_codes_says_what_the_code_says() -> None:
    page = (Path(__file__).parents[3] / "docs/reference/exit-codes.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([A-Z_]+)` \|", page, re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(code.value, code.name) for code in ExitCode]
