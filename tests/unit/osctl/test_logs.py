"""`osctl logs` against pods whose logs grow while they are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_api import FakeApi, refusal
from fake_logs import PODS, FakePod, FakeRun
from osctl import log_following, log_sources, pod_logs, run_logs
from osctl.commands import logs as logs_command
from osctl.main import COMPLETE

BOTH = "[rank 0] zero\n[rank 2] two\n[rank 3] three\n[rank 1] one\n[pod 0] [launcher] x\n"


@pytest.fixture
def run(api: FakeApi, home: Path) -> FakeRun:
    return FakeRun(api, run_uri=str(home / "run"))


@pytest.fixture(autouse=True)
def _brief_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_following, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(log_following, "_LOOK_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(log_following, "_WINDOW_SECONDS", 0.05)
    monkeypatch.setattr(logs_command, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(pod_logs, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(run_logs, "_POLL_SECONDS", 0.02)


def _two_pods(run: FakeRun) -> tuple[FakePod, FakePod]:
    first = run.pod(0).start((1, "zero"), (4, "[rank 1] one"), (5, "[launcher] x"))
    return first, run.pod(1).start((2, "[rank 2] two"), (3, "[rank 3] three"))


@contextmanager
def _meanwhile(*acts: Callable[[], Any]) -> Iterator[None]:
    """What happens while a command goes on: each act is a condition to wait for, or something to do."""
    errors: list[str] = []

    def play() -> None:
        for act in acts:
            deadline = time.monotonic() + 20
            while act() is False:
                if time.monotonic() > deadline:
                    errors.append("it never came to that")
                    return
                time.sleep(0.005)

    thread = threading.Thread(target=play)
    thread.start()
    yield
    thread.join()
    assert errors == []


def _is_followed(pod: FakePod, times: int = 1) -> Callable[[], bool]:
    return lambda: sum("follow" in asked for asked in pod.requests) >= times


# ------------------------------------------------------------------------------------------------------- what there is


def test_ranks_come_in_the_order_of_time_with_their_number(run: FakeRun, osctl: Any) -> None:
    _two_pods(run)
    assert osctl("logs", "demo") == (0, BOTH, "")


def test_one_rank_is_read_from_its_pod_alone_and_has_no_label(run: FakeRun, osctl: Any) -> None:
    first, second = _two_pods(run)
    assert osctl("logs", "demo", "--rank", "3") == (0, "three\n", "")
    assert (len(first.requests), len(second.requests)) == (0, 1)


def test_a_run_of_one_rank_has_no_labels(api: FakeApi, osctl: Any) -> None:
    run = FakeRun(api, nodes=1, resolved={"procsPerNode": 1, "worldSize": 1})
    run.pod(0).start((1, "zero"), (2, "[launcher] x"))
    assert osctl("logs", "demo").out == "zero\n[launcher] x\n"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("--tail", "2"), BOTH.splitlines()[3:]),
        (("--tail", "0"), []),
        (("--tail", "1", "--rank", "0"), ["zero"]),
        (("--grep", "t[wh]"), BOTH.splitlines()[1:3]),
        (("--grep", "t", "--tail", "1"), ["[rank 3] three"]),
        (("--since", "2026-01-01T00:00:03Z"), BOTH.splitlines()[2:]),
        (("--since", "2026-01-01T00:00:03.5Z"), BOTH.splitlines()[3:]),
        (("--since", "10m"), []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_fewer_lines(run: FakeRun, osctl: Any, words: tuple[str, ...], lines: list[str]) -> None:
    _two_pods(run)
    result = osctl("logs", "demo", *words)
    assert (result.code, result.out.splitlines()) == (0, lines)


def test_the_api_server_sends_no_more_than_a_tail_needs(run: FakeRun, osctl: Any) -> None:
    pods = _two_pods(run)
    osctl("logs", "demo", "--tail", "2")
    assert [pod.requests[0]["tailLines"] for pod in pods] == ["2", "2"]
    osctl("logs", "demo", "--tail", "2", "--grep", "x")
    assert ["tailLines" in pod.requests[1] for pod in pods] == [False, False]


def test_a_broken_connection_loses_and_doubles_nothing(run: FakeRun, osctl: Any) -> None:
    pod = run.pod(0).start(*((second / 4, f"line {second}") for second in range(20)))
    run.pod(1).start((1.1, "[rank 2] two"))
    pod.cuts = [3, 2, 0, 9]
    assert osctl("logs", "demo", "--rank", "0").out.splitlines() == [f"line {number}" for number in range(20)]
    assert len(pod.requests) == 5


def test_lines_of_the_same_moment_are_not_taken_for_old_ones(run: FakeRun, osctl: Any) -> None:
    pod = run.pod(0).start(*((7, f"line {number}") for number in range(6)))
    run.pod(1).start()
    pod.cuts = [4]
    assert osctl("logs", "demo", "--rank", "0").out.splitlines() == [f"line {number}" for number in range(6)]


def test_words_of_the_kubelet_are_shown_as_they_are(run: FakeRun, api: FakeApi, osctl: Any) -> None:
    pod = run.pod(0).start((1, "zero"))
    run.pod(1).start()
    api.on("GET", f"{pod.path}/log", "2026-01-01T00:00:01Z zero\nfailed to watch the log: no space\n")
    assert osctl("logs", "demo", "--rank", "0").out == "zero\nfailed to watch the log: no space\n"


# ------------------------------------------------------------------------------------------------------------- waiting


def test_pods_that_have_not_started_are_waited_for(run: FakeRun, osctl: Any) -> None:
    def create() -> None:
        run.pod(0)
        run.pod(1)

    with _meanwhile(
        lambda: any(request.path == PODS for request in run._api.requests),
        create,
        lambda: time.sleep(0.2),
        lambda: run.pods[0].start((1, "zero")) and None,
        lambda: run.pods[1].start() and None,
    ):
        result = osctl("logs", "demo")
    assert (result.code, result.out) == (0, "[rank 0] zero\n")
    assert "demo is Running: waiting for the pods of attempt 1\n" in result.err
    assert "waiting for the pods of attempt 1 to start: 2 of 2 ContainerCreating\n" in result.err


def test_a_suspended_run_is_not_waited_for(run: FakeRun, osctl: Any) -> None:
    run.set(phase="Suspended")
    result = osctl("logs", "demo")
    assert result.code == 3
    assert "there is no folder" in result.err
    assert "mount it here" in result.err


# ----------------------------------------------------------------------------------------------------------- following


def test_following_ends_with_the_run_and_has_every_line(run: FakeRun, osctl: Any) -> None:
    first, second = _two_pods(run)
    with _meanwhile(
        _is_followed(first),
        _is_followed(second),
        lambda: second.say((11, "[rank 2] later")) and None,
        lambda: first.say((10, "earlier")) and None,
        lambda: first.end() and second.end() and None,
        lambda: run.set(phase="Succeeded"),
    ):
        result = osctl("logs", "demo", "-f")
    assert result == (0, BOTH + "[rank 0] earlier\n[rank 2] later\n", "")


def test_following_goes_on_with_the_next_attempt(run: FakeRun, osctl: Any) -> None:
    pod = run.pod(0).start((1, "one"))
    run.pod(1).start()
    record = {"number": 1, "cause": "WorkerFailed", "endedAt": "2026-01-01T00:01:00Z"}

    def restart() -> None:
        run.pods = []
        run.pod(0, attempt=2).start((100, "two")).end()
        run.pod(1, attempt=2).start().end()
        run.set(phase="Succeeded", attempt=2)

    with _meanwhile(
        _is_followed(pod),
        lambda: [each.end(1) for each in run.pods] and None,
        lambda: run.set(phase="Restarting", attempts=[record]),
        restart,
    ):
        result = osctl("logs", "demo", "-f", "--rank", "0")
    assert (result.code, result.out) == (0, "one\ntwo\n")
    assert "attempt 1 has ended (WorkerFailed): going on with attempt 2\n" in result.err


def test_following_survives_a_broken_connection(run: FakeRun, osctl: Any) -> None:
    pod = run.pod(0).start((1, "one"))
    run.pod(1).start()
    pod.cuts = [9, 1, 1, 9]
    with _meanwhile(
        _is_followed(pod),
        lambda: pod.say((2.1, "two"), (2.2, "three"), (2.3, "four")) and None,
        _is_followed(pod, 3),
        lambda: pod.say((3, "five")) and None,
        lambda: [each.end() for each in run.pods] and None,
        lambda: run.set(phase="Succeeded"),
    ):
        result = osctl("logs", "demo", "-f", "--rank", "0")
    assert result.out.splitlines() == ["one", "two", "three", "four", "five"]


def test_a_stream_that_ends_while_the_pod_runs_is_opened_again(run: FakeRun, api: FakeApi, osctl: Any) -> None:
    pod = run.pod(0).start((1, "one"))
    run.pod(1).start()
    real = api.answers["GET", f"{pod.path}/log"]
    lines = "2026-01-01T00:00:01Z one\n"
    api.answers["GET", f"{pod.path}/log"] = [(200, lines), (200, lines), *real]
    with _meanwhile(
        _is_followed(pod),
        lambda: pod.say((2, "two")) and None,
        lambda: [each.end() for each in run.pods] and None,
        lambda: run.set(phase="Succeeded"),
    ):
        assert osctl("logs", "demo", "-f", "--rank", "0").out == "one\ntwo\n"


def test_following_begins_with_the_tail(run: FakeRun, osctl: Any) -> None:
    first, second = _two_pods(run)
    with _meanwhile(
        _is_followed(first),
        lambda: first.say((10, "later")) and None,
        lambda: first.end() and second.end() and None,
        lambda: run.set(phase="Succeeded"),
    ):
        assert osctl("logs", "demo", "-f", "--tail", "1").out == "[pod 0] [launcher] x\n[rank 0] later\n"


def test_following_a_run_that_is_deleted_ends_with_3(run: FakeRun, osctl: Any) -> None:
    first, second = _two_pods(run)
    with _meanwhile(_is_followed(first), lambda: first.end() and second.end() and None, run.delete):
        result = osctl("logs", "demo", "-f")
    assert (result.code, result.out) == (3, BOTH)
    assert "demo was deleted meanwhile" in result.err


def test_one_pod_whose_log_cannot_be_read_does_not_silence_the_others(run: FakeRun, api: FakeApi, osctl: Any) -> None:
    _, second = _two_pods(run)
    api.on("GET", f"{second.path}/log", refusal(500, "InternalError", "dial tcp 10.0.0.2:10250: connection refused"))
    result = osctl("logs", "demo")
    assert result.code == 1
    assert result.out == "[rank 0] zero\n[rank 1] one\n[pod 0] [launcher] x\n"
    assert "the log of pod demo-a1-1 cannot be read: dial tcp 10.0.0.2:10250: connection refused\n" in result.err


# --------------------------------------------------------------------------------------------------- the run directory


def _store(home: Path, attempt: int, rank: int, *parts: str) -> None:
    folder = home / f"run/logs/attempt-{attempt}/rank-{rank}"
    folder.mkdir(parents=True)
    for number, text in enumerate(parts):
        (folder / f"part-{number:05d}.log").write_text(text)


def _stored(home: Path) -> None:
    _store(home, 1, 0, "[2026-01-01 00:00:01] begins\n  more\n", "[2026-01-01 00:00:09] ends\n")
    _store(home, 1, 1, "before\n[2026-01-01 00:00:05] middle\n")


def test_when_the_pods_are_gone_the_run_directory_tells(run: FakeRun, home: Path, osctl: Any) -> None:
    _stored(home)
    run.set(phase="Succeeded")
    lines = ["[rank 0] [2026-01-01 00:00:01] begins", "[rank 0]   more", "[rank 1] before"]
    lines += ["[rank 1] [2026-01-01 00:00:05] middle", "[rank 0] [2026-01-01 00:00:09] ends"]
    result = osctl("logs", "demo")
    assert (result.code, result.out.splitlines()) == (0, lines)
    assert result.err == f"pods of attempt 1 are gone: reading {home}/run\n"
    assert osctl("logs", "demo", "--tail", "2").out.splitlines() == lines[-2:]
    assert osctl("logs", "demo", "--rank", "1").out == "before\n[2026-01-01 00:00:05] middle\n"
    assert osctl("logs", "demo", "--since", "2026-01-01T00:00:05Z", "--rank", "0").out == "[2026-01-01 00:00:09] ends\n"


def test_a_tail_is_read_from_the_end_of_the_files(
    run: FakeRun, home: Path, osctl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_logs, "_BLOCK_BYTES", 16)
    _store(home, 1, 0, *("".join(f"line {part}.{number}\n" for number in range(9)) for part in range(3)))
    run.set(phase="Succeeded")
    every = [f"line {part}.{number}" for part in range(3) for number in range(9)]
    assert osctl("logs", "demo", "--rank", "0").out.splitlines() == every
    for count in (1, 2, 10, 99):
        assert osctl("logs", "demo", "--rank", "0", "--tail", str(count)).out.splitlines() == every[-count:]


def test_of_a_pod_that_is_gone_the_run_directory_tells(run: FakeRun, home: Path, osctl: Any) -> None:
    run.pod(0).start((1, "zero"))
    _store(home, 1, 0, "not from here\n")
    _store(home, 1, 3, "[2026-01-01 00:00:05] last words\n")
    result = osctl("logs", "demo")
    assert (result.code, result.out) == (0, "[rank 0] zero\n[rank 3] [2026-01-01 00:00:05] last words\n")
    assert "some pods of attempt 1 are gone" in result.err


def test_a_log_that_the_node_has_removed_is_read_from_the_run_directory(
    run: FakeRun, api: FakeApi, home: Path, osctl: Any
) -> None:
    run.set(phase="Succeeded")
    pod = run.pod(0).start().end()
    api.on("GET", f"{pod.path}/log", "unable to retrieve container logs for containerd://1234")
    _stored(home)
    assert osctl("logs", "demo", "--rank", "1").out == "before\n[2026-01-01 00:00:05] middle\n"


@pytest.mark.parametrize("what", ["pods", "pods/log"])
def test_without_rights_to_pods_the_run_directory_tells(
    run: FakeRun, api: FakeApi, home: Path, osctl: Any, what: str
) -> None:
    pod = run.pod(0).start((1, "x"))
    run.pod(1).start((1, "x"))
    path = PODS if what == "pods" else f"{pod.path}/log"
    api.on("GET", path, refusal(403, "Forbidden", "no"))
    api.on("GET", f"{run.pods[1].path}/log", refusal(403, "Forbidden", "no"))
    _stored(home)
    result = osctl("logs", "demo", "--rank", "1")
    assert (result.code, result.out) == (0, "before\n[2026-01-01 00:00:05] middle\n")
    assert result.err.startswith(("you may not list pods", "you may not read the logs of pods"))


def test_without_rights_to_pods_the_run_directory_is_followed(
    run: FakeRun, api: FakeApi, home: Path, osctl: Any
) -> None:
    api.on("GET", PODS, refusal(403, "Forbidden", "no"))
    _stored(home)
    part = home / "run/logs/attempt-1/rank-0/part-00001.log"

    def grow() -> None:
        with open(part, "a") as file:
            file.write("[2026-01-01 00:00:20] more\n")

    with _meanwhile(lambda: run.num_watches > 0, grow, lambda: time.sleep(0.1), lambda: run.set(phase="Succeeded")):
        result = osctl("logs", "demo", "-f", "--rank", "0")
    assert result.code == 0
    assert result.out.splitlines()[-2:] == ["[2026-01-01 00:00:09] ends", "[2026-01-01 00:00:20] more"]


def test_all_attempts_one_after_the_other(run: FakeRun, home: Path, osctl: Any) -> None:
    _store(home, 1, 0, "[2026-01-01 00:00:01] first\n")
    run.set(attempt=3, phase="Succeeded")
    run.pod(0, attempt=3).start((100, "third")).end()
    result = osctl("logs", "demo", "--attempt", "all", "--rank", "0")
    assert result.out == "[2026-01-01 00:00:01] first\nthird\n"
    assert "no logs of attempt 2 of demo" in result.err
    assert osctl("logs", "demo", "--attempt", "2").code == 3


def test_the_first_failed_rank_is_that_of_the_newest_failure(run: FakeRun, home: Path, osctl: Any) -> None:
    attempts = [
        {"number": 1, "cause": "WorkerFailed", "rank": 1, "nodes": 2, "endedAt": "2026-01-01T00:01:00Z"},
        {"number": 2, "cause": "WorkerFailed", "rank": 3, "nodes": 2, "endedAt": "2026-01-01T00:02:00Z"},
        {"number": 3, "nodes": 2},
    ]
    run.set(attempt=3, attempts=attempts)
    _store(home, 1, 1, "first\n")
    run.pod(1, attempt=2).start((5, "[rank 2] peer lost"), (4, "[rank 3] boom")).end(1)
    assert osctl("logs", "demo", "--rank", "first-failed") == (0, "boom\n", "")
    assert osctl("logs", "demo", "--rank", "first-failed", "--attempt", "1").out == "first\n"
    result = osctl("logs", "demo", "--rank", "first-failed", "--attempt", "3")
    assert result.code == 3
    assert "nobody knows which rank of attempt 3 of demo failed first" in result.err


def test_a_run_directory_needs_no_cluster(home: Path, osctl: Any) -> None:
    _stored(home)
    (home / "run/attempts/1").mkdir(parents=True)
    first = '{"rank": 1, "time": 1, "code": 1, "reason": "x", "message": ""}'
    (home / "run/attempts/1/end.json").write_text(
        f'{{"code": 1, "message": "", "time": 1, "first": {first}, "codes": {{"0": 1, "1": 1}}}}'
    )
    assert osctl("logs", "./run", "--rank", "first-failed").out == "before\n[2026-01-01 00:00:05] middle\n"
    assert len(osctl("logs", "./run").out.splitlines()) == 5
    assert len(osctl("logs", "./run", "-f").out.splitlines()) == 5
    assert osctl("logs", "./nowhere").code == 3
    (home / "empty").mkdir()
    assert "holds no logs" in osctl("logs", "./empty").err


# --------------------------------------------------------------------------------------------- files, kinds, mistakes


def test_download_writes_a_file_for_each_rank(run: FakeRun, home: Path, osctl: Any) -> None:
    run.pod(0).start((1, "zero"), (2, "[rank 1] one"), (3, "[launcher] x"))
    _store(home, 1, 3, "three\n")
    result = osctl("logs", "demo", "--download", "out")
    assert result.code == 0
    names = ["pod-0", "rank-0", "rank-1", "rank-3"]
    assert result.out.splitlines() == [f"out/attempt-1/{name}.log" for name in names]
    found = {path.name: path.read_text() for path in (home / "out/attempt-1").iterdir()}
    assert found == dict(
        zip((f"{name}.log" for name in names), ("[launcher] x\n", "zero\n", "one\n", "three\n"), strict=True)
    )


def test_shards_of_a_sample_job_are_told_apart(api: FakeApi, osctl: Any) -> None:
    run = FakeRun(api)
    body = {**run.body, "kind": "SampleJob", "status": {"phase": "Running"}}
    api.on("GET", "/apis/opensora.dev/v1alpha1/namespaces/team/samplejobs/demo", body)
    run.pod(0).start((1, "a clip"), (3, "[rank 1] another"))
    run.pod(1).start((2, "a third"))
    assert osctl("logs", "sj/demo").out == "[shard 0] a clip\n[shard 1] a third\n[shard 0] [rank 1] another\n"
    refused = osctl("logs", "sj/demo", "--rank", "1")
    assert refused.code == 2
    assert "demo has shards" in refused.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--rank", "9"), 3, "its ranks are 0 to 3"),
        (("--rank", "-1"), 2, "a number, all, or first-failed"),
        (("--rank", "first"), 2, "a number, all, or first-failed"),
        (("--attempt", "7"), 3, "it has attempt 1 alone"),
        (("--attempt", "x"), 2, "a number, or all"),
        (("--since", "yesterday"), 2, "--since 'yesterday' is no time"),
        (("--since", "12:00"), 2, "--since '12:00' is no time"),
        (("--grep", "("), 2, "no regular expression"),
        (("--tail", "-1"), 2, "--tail"),
        (("--download", "x", "-f"), 2, "leave out --follow"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_asked_is_refused(
    run: FakeRun, osctl: Any, words: tuple[str, ...], code: int, said: str
) -> None:
    _two_pods(run)
    result = osctl("logs", "demo", *words)
    assert (result.code, result.out) == (code, "")
    assert said in result.err
    assert len(result.err.splitlines()) <= 2


@pytest.mark.parametrize("words", [(), ("-f",)])
def test_more_pods_than_can_be_read_at_once_are_refused(
    api: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(log_sources, "MAX_PODS", 3)
    run = FakeRun(api, nodes=4)
    for index in range(4):
        run.pod(index).start((index, f"[rank {2 * index}] x" if index else "x"))
    result = osctl("logs", "demo", *words)
    assert (result.code, result.out) == (2, "")
    assert "demo has 4 pods, and at most 3" in result.err
    assert "--rank N reads one of them" in result.err
    assert osctl("logs", "demo", "--rank", "6").out == "x\n"
    assert len(osctl("logs", "demo", "--download", "out").out.splitlines()) == 4


def test_profiles_have_no_logs(osctl: Any, api: FakeApi) -> None:
    assert osctl("logs", "ctp/h200").code == 2


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("osctl logs demo --rank ", ["all", "first-failed", "0", "1", "2", "3"]),
        ("osctl logs demo --rank f", ["first-failed"]),
        ("osctl logs demo --attempt ", ["2", "1", "all"]),
        ("osctl logs d", ["demo"]),
    ],
)
def test_a_shell_completes_ranks_and_attempts(
    run: FakeRun,
    osctl: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    found: list[str],
) -> None:
    run.set(attempt=2)
    monkeypatch.setenv(COMPLETE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - (not words.endswith(" "))))
    with pytest.raises(SystemExit):
        osctl()
    assert capsys.readouterr().out.split() == found
