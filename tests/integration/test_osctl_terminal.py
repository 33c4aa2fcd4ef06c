"""`osctl watch` and `osctl train --follow` on a real terminal, against an API server of canned answers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import RUNS, FakeApi, refusal
from fake_logs import PODS, FakeRun
from terminals import Terminal, osctl_words

pytestmark = pytest.mark.integration

PROGRESS = {"step": 40, "totalSteps": 100, "percent": 40, "loss": "0.5", "secondsPerStep": "1", "eta": "1m"}
FAILED = {
    "type": "Failed",
    "status": "True",
    "reason": "RestartBudgetExceeded",
    "message": "it broke",
    "lastTransitionTime": "2026-01-01T01:00:00Z",
    "observedGeneration": 1,
}
CONFIG = "data: {path: s3://b/clips.csv, bucket_config: {64px: {17: [1.0, 4]}}}\ntrain: {steps: 10}\n"

Open = Callable[..., Terminal]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    with FakeApi() as running:
        (tmp_path / ".kube").mkdir()
        running.write_kubeconfig(tmp_path / ".kube" / "config")
        yield running


@pytest.fixture
def run(api: FakeApi) -> FakeRun:
    return FakeRun(api, progress=PROGRESS)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    hidden = ("KUBECONFIG", "NO_COLOR", "XDG_CONFIG_HOME", "COLUMNS", "LINES", "TERM")
    known = {name: value for name, value in os.environ.items() if name not in hidden and not name.startswith("OSCTL_")}
    return {**known, "HOME": str(tmp_path)}


@pytest.fixture
def terminal(tmp_path: Path, environment: dict[str, str]) -> Open:
    def open_terminal(*words: str, columns: int = 80, lines: int = 40, **env: str) -> Terminal:
        return Terminal(*osctl_words(*words), env={**environment, **env}, folder=tmp_path, columns=columns, lines=lines)

    return open_terminal


def _manifest(folder: Path) -> str:
    spec = {"runUri": "s3://bucket/demo", "image": "example.com/x:1", "config": {"inline": CONFIG}, "nodes": 2}
    body = {"apiVersion": "opensora.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": "demo"}, "spec": spec}
    (folder / "run.yaml").write_text(yaml.safe_dump(body))
    return "run.yaml"


# --------------------------------------------------------------------------------------------------------------- watch


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_screen_is_that_of_status_and_changes_in_place(run: FakeRun, terminal: Open, columns: int) -> None:
    with terminal("watch", "demo", columns=columns) as seen:
        seen.until_shown("step 40 of 100")
        run.set(progress={**PROGRESS, "step": 41})
        seen.until_shown("step 41 of 100")
        assert not seen.screen.is_cursor_shown
        run.set(phase="Succeeded", endedAt="2026-01-01T01:00:00Z")
        assert seen.ended() == 0
        assert seen.has_its_settings()
    shown = "\n".join(seen.screen.shown)
    assert shown.count("TrainingRun demo in team: Succeeded") == 1
    assert "step 40" not in shown, "nothing of an older screen is left over"
    assert max(map(len, seen.screen.rows)) <= columns
    assert seen.screen.is_cursor_shown


def test_nothing_flickers(run: FakeRun, terminal: Open) -> None:
    drawn_again = re.compile(r"\r\x1b\[2K(\x1b\[1A\x1b\[2K)+TrainingRun demo")
    with terminal("watch", "demo") as seen:
        seen.until(lambda: len(drawn_again.findall(seen.text)) > 2, "two ticks")
        run.set(phase="Succeeded", endedAt="2026-01-01T01:00:00Z")
        seen.ended()
    num_frames = seen.text.count("TrainingRun demo")
    assert len(drawn_again.findall(seen.text)) == num_frames - 1, "what is wiped is drawn again at once"
    for clearing in ("\x1b[2J", "\x1b[J", "\x1b[H"):
        assert clearing not in seen.text


@pytest.mark.parametrize(("reason", "code"), [("RestartBudgetExceeded", 6), ("Cancelled", 7), ("NoProgress", 10)])
def test_the_exit_code_is_the_outcome(run: FakeRun, terminal: Open, reason: str, code: int) -> None:
    run.set(phase="Failed", conditions=[{**FAILED, "reason": reason}], endedAt="2026-01-01T01:00:00Z")
    with terminal("watch", "demo") as seen:
        assert seen.ended() == code
    assert seen.screen.shown[0].startswith("TrainingRun demo in team: Failed, after 1h")


@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "Ctrl-C"])
def test_leaving_lets_the_run_go_on_and_says_how_to_come_back(
    run: FakeRun, api: FakeApi, terminal: Open, key: str
) -> None:
    with terminal("watch") as seen:
        seen.until_shown("step 40 of 100")
        seen.type(key)
        assert seen.ended() == 130
        assert seen.has_its_settings()
    assert seen.screen.shown[-2] == "demo goes on; `osctl watch demo` comes back to it"
    assert seen.screen.is_cursor_shown
    assert "Traceback" not in seen.text
    assert api.writes() == []


def test_a_low_window_keeps_the_next_thing_to_do(run: FakeRun, terminal: Open) -> None:
    with terminal("watch", "demo", lines=8) as seen:
        seen.until_shown("next: ")
        run.set(progress={**PROGRESS, "step": 41})
        seen.until_shown(r"(?s)step 41.* lines more: make the window higher\nnext: ")
        assert len(seen.screen.rows) <= 8
        run.set(phase="Succeeded", endedAt="2026-01-01T01:00:00Z")
        assert seen.ended() == 0
    assert "s3://bucket/demo" in seen.text, "the last screen is whole"


def test_an_api_server_that_goes_away_is_waited_for(run: FakeRun, api: FakeApi, terminal: Open) -> None:
    with terminal("watch", "demo") as seen:
        seen.until_shown("step 40 of 100")
        real = api.answers["GET", f"{RUNS}/demo"]
        api.on("GET", f"{RUNS}/demo", refusal(429, "TooManyRequests", "etcd has no leader"))
        api.on("GET", RUNS, refusal(429, "TooManyRequests", "etcd has no leader"))
        run.set(progress={**PROGRESS, "step": 41})
        seen.until_shown("not seen: changes, since etcd has no leader")
        api.answers["GET", f"{RUNS}/demo"] = real
        run.set(phase="Succeeded", endedAt="2026-01-01T01:00:00Z")
        assert seen.ended() == 0


def test_what_may_not_be_seen_is_said(run: FakeRun, api: FakeApi, terminal: Open) -> None:
    api.on("GET", PODS, refusal(403, "Forbidden", "no"))
    with terminal("watch", "demo") as seen:
        seen.until_shown("not seen: pods, since you may not list them")
        run.delete()
        assert seen.ended() == 3
    assert seen.screen.shown[-2] == "error: demo was deleted meanwhile"


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {}], ids=["dumb terminal", "pipe"])
def test_without_a_terminal_each_change_is_a_line(
    run: FakeRun, terminal: Open, environment: dict[str, str], tmp_path: Path, env: dict[str, str]
) -> None:
    stages: list[dict[str, Any]] = [
        {"progress": {**PROGRESS, "lastUpdate": "2026-01-01T00:30:00Z"}},  # an age alone is no change
        {"progress": {**PROGRESS, "step": 41}},
        {"phase": "Failed", "conditions": [FAILED]},
    ]
    if env:
        with terminal("watch", "demo", **env) as seen:
            seen.until(lambda: "step 40" in seen.text)
            for stage in stages:
                run.set(**stage)
                seen.until(lambda: run.num_watches > 0)
            assert seen.ended() == 6
        lines = seen.text.replace("\r", "").splitlines()
    else:
        for stage in stages:
            run.set(**stage)
        done = subprocess.run(
            osctl_words("watch", "demo"), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (6, "")
        lines = done.stdout.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ demo: ", line) for line in lines)
    assert lines[-1].endswith("demo: Failed, step 41 of 100, loss 0.5, 1 s/step; RestartBudgetExceeded: it broke")
    assert len(lines) == len(set(lines))
    assert "\x1b" not in "".join(lines)


def test_the_newest_run_that_goes_on_is_taken(run: FakeRun, api: FakeApi, terminal: Open) -> None:
    run.set(phase="Succeeded")
    with terminal("watch") as seen:
        assert seen.ended() == 3
    assert "no run goes on in namespace team" in seen.text


# ------------------------------------------------------------------------------------------------------ train --follow


@pytest.fixture
def submitted(run: FakeRun, api: FakeApi) -> FakeRun:
    api.on("POST", RUNS, lambda request: run.body)
    api.on("PATCH", f"{RUNS}/demo", lambda request: run.body)
    return run


def test_train_follows_the_run_to_its_end(submitted: FakeRun, terminal: Open, tmp_path: Path) -> None:
    with terminal("train", _manifest(tmp_path), "--follow") as seen:
        seen.until_shown("step 40 of 100")
        submitted.set(phase="Succeeded", endedAt="2026-01-01T01:00:00Z")
        assert seen.ended() == 0
    assert "trainingrun.opensora.dev/demo created" in seen.text


@pytest.mark.parametrize("answer", ["\r", "n\r", "\x03", "\x04"], ids=["Enter", "n", "Ctrl-C", "Ctrl-D"])
def test_control_c_detaches_and_stops_nothing_unasked(
    submitted: FakeRun, api: FakeApi, terminal: Open, tmp_path: Path, answer: str
) -> None:
    with terminal("train", _manifest(tmp_path), "--follow") as seen:
        seen.until_shown("step 40 of 100")
        seen.type("\x03")
        seen.until_shown(r"demo goes on; `osctl watch demo` comes back to it\nStop the run as well\? \[y/N\]")
        seen.type(answer)
        assert seen.ended() == 130
    assert "Traceback" not in seen.text
    assert [method for method, _, _ in api.writes()] == ["POST"]


def test_a_run_is_stopped_when_that_is_asked_for(
    submitted: FakeRun, api: FakeApi, terminal: Open, tmp_path: Path
) -> None:
    with terminal("train", _manifest(tmp_path), "--follow") as seen:
        seen.until_shown("step 40 of 100")
        seen.type("\x03")
        seen.until_shown(r"\[y/N\]")
        seen.type("y\r")
        assert seen.ended() == 7
    assert api.writes()[-1] == ("PATCH", f"{RUNS}/demo", {"spec": {"requests": {"stop": True}}})
    assert "trainingrun.opensora.dev/demo saves and ends" in seen.text


def test_logs_leave_with_control_c(run: FakeRun, terminal: Open) -> None:
    run.pod(0).start((1, "hello"))
    run.pod(1).start()
    with terminal("logs", "demo", "-f") as seen:
        seen.until_shown(r"\[rank 0\] hello")
        run.pods[0].say((2, "more"))
        seen.until_shown(r"\[rank 0\] more")
        seen.type("\x03")
        assert seen.ended() == 130
    assert "Traceback" not in seen.text
