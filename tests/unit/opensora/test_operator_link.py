"""Rank 0's line to the operator: when it reports, what it hears, and what an operator in trouble costs."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from opensora_operator.certificates import Authorities, make_authority
from progress_channel import Operator

from opensora.errors import ConfigError
from opensora.training.operator_link import OperatorAddress, OperatorLink, Requests
from opensora.training.progress import ProgressState

PATIENCE = 10.0
ADDRESS = OperatorAddress(url="https://operator/progress", token_file=Path("/none"), ca_file=Path("/none"))


def state(step: int, **changes: Any) -> ProgressState:
    values = ProgressState(
        phase="training", state="Training", step=step, total_steps=10, epoch=0, loss=0.5, seconds_per_step=2.0,
        samples_per_second=4.0, eta_seconds=20.0, goodput=0.9, attempt=1, checkpoint_step=None, samples_step=None,
        updated=1e9,
    )  # fmt: skip
    return replace(values, **changes)


class Asked:
    """What was passed on by `Requests`."""

    def __init__(self) -> None:
        self.stops = 0
        self.dumps: list[tuple[str, Callable[[], None]]] = []
        self.requests = Requests(stop=self._stop, dump=lambda name, done: self.dumps.append((name, done)))

    def _stop(self) -> None:
        self.stops += 1


class Line:
    """A link whose messages go to a function in place of a network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, tick: float = 0.005) -> None:
        self.messages: list[dict[str, Any]] = []
        self.arrived = threading.Semaphore(0)
        self.answer: Callable[[], dict[str, Any]] = dict
        self.stopping = False
        self.asked = Asked()
        monkeypatch.setattr("opensora.training.operator_link._TICK_SECONDS", tick)
        monkeypatch.setattr(OperatorLink, "_post", self._post)
        self.link = OperatorLink(ADDRESS, requests=self.asked.requests, stop_requested=lambda: self.stopping)

    def _post(self, body: bytes) -> dict[str, Any]:
        try:
            reply = self.answer()
            self.messages.append(json.loads(body))
            return reply
        finally:
            self.arrived.release()

    def wait(self) -> dict[str, Any]:
        """The next message that arrives."""
        known = len(self.messages)
        while len(self.messages) == known:
            assert self.arrived.acquire(timeout=PATIENCE)
        return self.messages[-1]

    def is_silent(self) -> bool:
        """For twenty looks of the thread."""
        return not self.arrived.acquire(timeout=0.1)

    def close(self, last: ProgressState, timeout_seconds: float = 5.0) -> None:
        self.link.close(last, timeout_seconds=timeout_seconds)
        self.link.join()


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    line = Line(monkeypatch)
    yield line
    line.answer = dict
    line.close(state(10, phase="done"))


def test_a_report_is_the_state_with_a_number(line: Line) -> None:
    line.link.update(state(3))
    assert line.wait() == asdict(state(3)) | {"sequence": 1, "requests": {}}


@pytest.mark.parametrize(
    "change",
    [{"state": "Evaluating"}, {"checkpoint_step": 4}, {"samples_step": 4}, {"phase": "failed"}],
    ids=lambda change: next(iter(change)),
)
def test_what_has_happened_is_reported_at_once(line: Line, change: dict[str, Any]) -> None:
    line.link.update(state(4))
    line.wait()
    for step in range(5, 8):
        line.link.update(state(step))
    assert line.is_silent(), "steps alone wait for the interval"
    line.link.update(state(8, **change))
    told = line.wait()
    assert told["step"] == 8
    assert told | change == told
    assert line.is_silent(), "once"


def test_the_first_step_is_reported_at_once(line: Line) -> None:
    line.link.update(state(0, state="Training"))
    line.wait()
    line.link.update(state(1))
    assert line.wait()["step"] == 1
    line.link.update(state(2))
    assert line.is_silent()


def test_a_signal_to_stop_is_reported_before_the_loop_knows(line: Line) -> None:
    line.link.update(state(4))
    line.wait()
    line.stopping = True
    assert line.wait()["state"] == "Stopping"


def test_a_step_that_takes_long_is_reported_again_at_the_interval_that_the_operator_names(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("opensora.training.operator_link.time.monotonic", lambda: now[0])
    line.answer = lambda: {"interval_seconds": 60}
    line.link.update(state(4))
    line.wait()
    now[0] += 59
    assert line.is_silent()
    now[0] += 1.5
    assert line.wait() == line.messages[0] | {"sequence": 2}, "that nothing has moved is told as well"


@pytest.mark.parametrize("interval", [0, -1, 1e9, "soon", None, float("nan")])
def test_an_interval_that_is_none_changes_nothing(line: Line, interval: Any) -> None:
    line.answer = lambda: {"interval_seconds": interval}
    line.link.update(state(4))
    line.wait()
    assert line.is_silent()


def test_the_last_state_is_reported_when_the_run_ends(line: Line) -> None:
    line.link.update(state(4))
    line.wait()
    line.close(state(10, phase="done", state="Stopping", checkpoint_step=10))
    assert line.messages[-1]["phase"] == "done"
    assert [told["sequence"] for told in line.messages] == [1, 2]


def test_an_operator_that_is_away_is_tried_again_with_the_newest_state(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> dict[str, Any]:
        raise ConnectionRefusedError("connection refused")

    line.answer = refuse
    with caplog.at_level(logging.INFO):
        line.link.update(state(4, checkpoint_step=4))
        for _ in range(3):
            assert line.arrived.acquire(timeout=PATIENCE)
        line.link.update(state(6, checkpoint_step=4))
        line.answer = dict
        told = line.wait()
        assert (told["step"], told["checkpoint_step"]) == (6, 4)
        assert line.is_silent()
    messages = [record.message for record in caplog.records]
    assert messages == [
        "progress does not reach the operator: connection refused; training goes on",
        "the operator hears the run again",
    ]


def test_pauses_between_tries_grow(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []

    def refuse() -> dict[str, Any]:
        times.append(time.monotonic())
        raise ConnectionRefusedError

    line.answer = refuse
    line.link.update(state(4))
    while len(times) < 6:
        assert line.arrived.acquire(timeout=PATIENCE)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    for number, gap in enumerate(gaps, start=1):
        assert gap > 0.005 * 2**number


def test_an_operator_that_hangs_delays_neither_the_loop_nor_its_end(line: Line) -> None:
    released = threading.Event()

    def hang() -> dict[str, Any]:
        released.wait(PATIENCE)
        return {}

    line.answer = hang
    begin = time.monotonic()
    for step in range(1, 1000):
        line.link.update(state(step))
    line.close(state(1000, phase="done"), timeout_seconds=0.05)
    assert time.monotonic() - begin < 1
    released.set()


# -------------------------------------------------------------------------------------------------------- requests


def test_a_checkpoint_is_asked_for_once_and_reported_when_it_is_committed(line: Line) -> None:
    committed = [False]
    line.answer = lambda: {"checkpoint": "c-1"}
    line.link.update(state(4))
    line.wait()
    requests = line.asked.requests
    assert requests.num_checkpoints == 1
    requests.saving(1, step=4, is_committed=lambda: committed[0])
    line.link.update(state(5, state="Saving"))
    assert line.wait()["requests"] == {}, "it is being saved"
    committed[0] = True
    told = line.wait()
    assert told["requests"] == {"checkpoint": "c-1"}
    assert told["checkpoint_step"] == 4
    assert requests.num_checkpoints == 1, "the same id is the same request"
    line.answer = lambda: {"checkpoint": "c-2"}
    line.link.update(state(6, state="Training"))
    line.wait()
    assert requests.num_checkpoints == 2


def test_one_save_serves_all_requests_before_it() -> None:
    requests = Asked().requests
    requests.hear({"checkpoint": "a"})
    requests.hear({"checkpoint": "b"})
    requests.saving(2, step=7, is_committed=lambda: True)
    assert requests.carried_out() == {"checkpoint": "b"}


def test_stacks_are_asked_for_once_and_reported_when_they_are_written() -> None:
    asked = Asked()
    for _ in range(3):
        asked.requests.hear({"dump": "d-1"})
    (name, done) = asked.dumps[0]
    assert (len(asked.dumps), name) == (1, "d-1")
    assert asked.requests.carried_out() == {}
    done()
    assert asked.requests.carried_out() == {"dump": "d-1"}


def test_a_stop_is_passed_on() -> None:
    asked = Asked()
    asked.requests.hear({"stop": False})
    asked.requests.hear({"stop": "yes"})
    assert asked.stops == 0
    asked.requests.hear({"stop": True})
    assert asked.stops == 1


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a/b", "x" * 65, "-a", 7, ["a"], {"id": "a"}])
def test_what_is_no_id_is_not_carried_out(name: Any, caplog: pytest.LogCaptureFixture) -> None:
    asked = Asked()
    asked.requests.hear({"dump": name})
    asked.requests.hear({"checkpoint": name})
    assert asked.dumps == []
    assert asked.requests.num_checkpoints == 0
    assert caplog.text.count("under an id that is none") == 1


# ----------------------------------------------------------------------------------------------------- the address


VARIABLES = {
    "OPENSORA_PROGRESS_URL": "https://opensora-progress.opensora-system.svc:9443/v1/namespaces/a/runs/b/progress",
    "OPENSORA_PROGRESS_TOKEN_FILE": "/var/run/opensora/token",
    "OPENSORA_PROGRESS_CA_FILE": "/etc/opensora/run/ca.crt",
}


def test_without_an_operator_there_is_no_link() -> None:
    assert OperatorAddress.from_environment({"PATH": "/bin"}) is None


def test_the_operator_is_found_in_the_environment() -> None:
    assert OperatorAddress.from_environment(VARIABLES) == OperatorAddress(
        url=VARIABLES["OPENSORA_PROGRESS_URL"],
        token_file=Path("/var/run/opensora/token"),
        ca_file=Path("/etc/opensora/run/ca.crt"),
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"OPENSORA_PROGRESS_URL": "http://operator/progress"}, "is no HTTPS"),
        ({"OPENSORA_PROGRESS_URL": "https:///progress"}, "is no HTTPS"),
        ({"OPENSORA_PROGRESS_TOKEN_FILE": None}, "without OPENSORA_PROGRESS_TOKEN_FILE"),
        ({"OPENSORA_PROGRESS_CA_FILE": None}, "without OPENSORA_PROGRESS_CA_FILE"),
    ],
)
def test_a_token_is_never_sent_in_the_clear(changes: dict[str, str | None], told: str) -> None:
    variables = {name: value for name, value in (VARIABLES | changes).items() if value is not None}
    with pytest.raises(ConfigError) as error:
        OperatorAddress.from_environment(variables)
    assert told in error.value.message
    assert "remove your own" in (error.value.hint or "")


# ----------------------------------------------------------------------------------------------- with a real operator


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    with Operator(tmp_path).running() as running:
        yield running


def post(operator: Operator, monkeypatch: pytest.MonkeyPatch, *states: ProgressState) -> Asked:
    """Report these states, waiting for each; returns what was asked for."""
    monkeypatch.setattr("opensora.training.operator_link._TICK_SECONDS", 0.01)
    address = OperatorAddress.from_environment(operator.environment)
    assert address is not None
    asked = Asked()
    link = OperatorLink(address, requests=asked.requests, stop_requested=lambda: False)
    for each in states[:-1]:
        known = len(operator.reports)
        link.update(each)
        end = time.monotonic() + PATIENCE
        while len(operator.reports) == known:
            assert time.monotonic() < end
            time.sleep(0.01)
    link.close(states[-1], timeout_seconds=PATIENCE)
    link.join()
    return asked


def test_the_real_operator_understands_every_report(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # the token goes to the operator alone
    operator.ask(dump={"id": "d-1"}, stop=True)
    states = [
        state(0, state="Starting", loss=None, seconds_per_step=None, samples_per_second=None, eta_seconds=None),
        state(5, checkpoint_step=5, samples_step=5),
        state(6, phase="stopped", state="Stopping", checkpoint_step=6),
    ]
    asked = post(operator, monkeypatch, *states)
    for sent, taken in zip(states, operator.reports, strict=True):
        for name in set(asdict(sent)) - {"updated"}:
            assert getattr(taken, name) == getattr(sent, name), name
    assert [name for name, _ in asked.dumps] == ["d-1"]
    assert asked.stops > 0


def test_why_the_operator_refuses_is_told(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(operator.cluster.make_token(pod="another"))
    monkeypatch.setattr("opensora.training.operator_link._TICK_SECONDS", 0.01)
    address = OperatorAddress.from_environment(operator.environment)
    assert address is not None
    link = OperatorLink(address, requests=Asked().requests, stop_requested=lambda: False)
    link.close(state(1, phase="failed"), timeout_seconds=0.5)
    link.join()
    assert "HTTP 403: the token's pod does not belong to attempt 1 of demo; training goes on" in caplog.text
    assert not operator.reports


def test_an_operator_that_is_not_known_gets_no_token(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "ca.crt").write_text(Authorities(current=make_authority(time.time())).bundle)
    monkeypatch.setattr("opensora.training.operator_link._TICK_SECONDS", 0.01)
    address = OperatorAddress.from_environment(operator.environment)
    assert address is not None
    link = OperatorLink(address, requests=Asked().requests, stop_requested=lambda: False)
    link.close(state(1, phase="failed"), timeout_seconds=0.5)
    link.join()
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert operator.cluster.num_reviews == 0
