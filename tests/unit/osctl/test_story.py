"""One run's story: golden screens of runs whose status the operator's own planner wrote."""

from __future__ import annotations

from typing import Any

import pytest
from opensora_operator.constants import ExitCode
from opensora_operator.views import view_pod
from opensora_operator.wire import format_time
from operator_world import World
from osctl.story import Story, as_data, as_text, tell


def _story(world: World, **more: Any) -> Story:
    world.run["metadata"]["creationTimestamp"] = format_time(1_000_000.0)
    pods = [view for pod in world.pods.values() if (view := view_pod(pod)) is not None]
    return tell(world.run, pods, now=world.now, **more)


def _text(world: World, *, width: int = 80, **more: Any) -> str:
    return as_text(_story(world, **more), width=width, now=world.now, paint=lambda text, _: text)


def _running() -> World:
    world = World(restartPolicy={"maxRestarts": 2})
    world.reconcile()
    world.start_pods()
    world.reconcile()
    world.now += 60
    world.say(40, checkpoint_step=30, eta_seconds=60.0)
    world.reconcile()
    return world


def _failed_once() -> World:
    world = _running()
    world.now += 10
    world.end_pod("demo-a1-1", ExitCode.FAILED, rank=3, step=42, message="CUDA error: an illegal memory access")
    world.run_job_controller()
    world.let_pods_end()
    world.reconcile()
    return world


def test_a_run_that_goes_on() -> None:
    assert (
        _text(_running())
        == """\
TrainingRun demo in team: Running, for 1m

  progress     [#########...............] step 40 of 100 (40 %), 1m to go
  speed        1 s/step, 4 clips/s, goodput 90 %
  loss         0.5
  reported     Training, 0s ago
  checkpoint   step 30, 0s ago
  nodes        2 of 2 ready, 4 ranks
  run          s3://bucket/demo

  ATTEMPT   STEPS    TOOK   END       FIRST FAILED
  1         from 0   1m     goes on

next: nothing to do: it goes on by itself; `osctl wait demo` ends when it does"""
    )


def test_a_run_that_lost_a_rank_names_it_with_its_last_words() -> None:
    text = _text(_failed_once())
    assert "Restarting, for 1m10s" in text
    assert "  1         0 to 42   1m10s   WorkerFailed   rank 3 on node-1, exit 1\n" in text
    assert "first failure of attempt 1: WorkerFailed, rank 3 (pod demo-a1-1, node node-1,\n  exit code 1)" in text
    assert "  | rank 3 failed first: CUDA error: an illegal memory access" in text
    assert "restarts     1 after failures (1 of 2 used), 0 after disruptions" in text


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for world in (_running(), _failed_once(), _without_nodes(), _rejected()):
        assert max(map(len, _text(world, width=width).splitlines())) <= width


def test_long_last_words_are_cut_to_a_screen() -> None:
    world = _failed_once()
    world.run["status"]["attempts"][0]["message"] = "\n".join(f"line {n}" for n in range(100)) + "\x1b[31m\r"
    text = _text(world)
    assert "| line 0\n" in text
    assert "| line 99" in text
    assert "line 50" not in text
    assert "\x1b" not in text
    assert len(text.splitlines()) < 40


def _suspended() -> World:
    world = World(suspend=True)
    world.reconcile()
    return world


def _rejected() -> World:
    world = World(image=None)
    world.reconcile()
    return world


def _without_nodes() -> World:
    world = World()
    world.reconcile()
    world.start_pods(ready=False)
    for pod in world.pods.values():
        pod["spec"].pop("nodeName")
        pod["status"]["conditions"] = [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are free"}
        ]
    world.reconcile()
    return world


def _cancelled() -> World:
    world = World(requests={"stop": True})
    world.reconcile()
    return world


def _unseen(seconds: float) -> World:
    world = World()
    world.now += seconds
    return world


def _done() -> World:
    world = _running()
    for name in list(world.pods):
        world.end_pod(name, 0)
    world.run_job_controller()
    world.reconcile()
    return world


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (_suspended, "`osctl resume demo` goes on from the newest checkpoint"),
        (_rejected, "spec.image is missing, and no profile gives one"),
        (_without_nodes, "0/3 nodes are free. Free or add nodes"),
        (lambda: _unseen(5), "wait a moment: the operator has not looked at this run yet"),
        (
            lambda: _unseen(500),
            "has not looked at this run: `osctl doctor` tells whether it works",
        ),
        (_done, "nothing to do: the run is done. Weights and samples are in s3://bucket/demo"),
        (_failed_once, "nothing to do: attempt 2 starts in 10s"),
    ],
    ids=["suspended", "rejected", "unschedulable", "new", "no operator", "done", "failed once"],
)
def test_the_next_thing_to_do_fits_the_state(world: Any, words: str) -> None:
    assert words in _story(world()).next


def test_a_change_that_the_operator_has_not_seen_is_said() -> None:
    world = _running()
    world.edit(suspend=True)
    world.now += 100
    assert "has not looked at the last change of this run" in _story(world).next


def test_a_stop_on_request_is_no_failure() -> None:
    story = _story(_cancelled())
    assert (story.phase, story.failure) == ("Failed", None)


def test_what_could_not_be_seen_is_said() -> None:
    assert "not seen: pods, since you may not list them" in _text(
        _running(), unseen=["pods, since you may not list them"]
    )


def test_a_reason_of_a_newer_operator_is_shown_as_it_is() -> None:
    world = _running()
    for found in world.run["status"]["conditions"]:
        if found["type"] == "Progressing":
            found |= {"status": "False", "reason": "Enchanted", "message": "a new kind of trouble"}
    assert "a new kind of trouble" in _story(world).next


def test_the_json_has_fixed_names() -> None:
    world = _failed_once()
    data = as_data(_story(world), world.run)
    assert set(data) == {
        "name",
        "namespace",
        "phase",
        "seconds",
        "runUri",
        "next",
        "firstFailure",
        "pods",
        "unseen",
        "status",
    }
    failure = data["firstFailure"]
    assert (failure["rank"], failure["node"], failure["exitCode"]) == (3, "node-1", 1)
    assert data["status"] == world.run["status"]
