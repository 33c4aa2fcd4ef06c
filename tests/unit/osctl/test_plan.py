"""What the operator does next, and what a file asks for: told by the operator's own planner and by arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import RUNS, FakeApi, refusal
from opensora_operator.constants import ExitCode
from opensora_operator.plans import Object
from opensora_operator.wire import format_time
from operator_world import MINIMAL_SPEC, World
from osctl import next_steps
from osctl.output import Output

from opensora.datasets.batch_table import BatchTable, BucketResult, Evidence

JOBS = "/apis/batch/v1/namespaces/team/jobs"
PODS = "/api/v1/namespaces/team/pods"
CONFIG_MAPS = "/api/v1/namespaces/team/configmaps"
SERVICES = "/api/v1/namespaces/team/services"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/team/networkpolicies"


def world_of(**spec: Any) -> World:
    return World(progress_url=None, **spec)


def told(world: World, *, width: int = 120) -> str:
    return next_steps.as_text(next_steps.next_steps(world.observe()), width=width, paint=Output().styled)


# ------------------------------------------------------------------------------------------------------ what comes next


def test_a_run_that_runs_needs_nothing() -> None:
    world = world_of(deadlines={"activeSeconds": 3600}).running()
    text = told(world)
    assert text.startswith("now: nothing, it is in the state that the operator wants\n")
    assert "  Running      True   AllPodsRunning: The container" in text
    assert "in 1h     the run has had its time (deadlines.activeSeconds)" in text


def test_a_failure_is_written_down_before_the_next_attempt() -> None:
    world = world_of(restartPolicy={"backoff": {"baseSeconds": 60}}).running()
    world.end_pod("demo-a1-1", 1, message="boom", rank=3, step=7)
    world.end_pod("demo-a1-0", ExitCode.PEER_LOST)
    world.run_job_controller()
    steps = next_steps.next_steps(world.observe())
    data = next_steps.as_data(steps)
    assert [one["reason"] for one in data["decisions"]] == ["WorkerFailed"]
    assert data["phase"] == {"now": "Running", "then": "Restarting"}
    assert data["actions"] == []
    assert data["waits"][0] == {"seconds": 60, "what": "the pause before attempt 2 is over"}
    text = told(world)
    assert "1. write down WorkerFailed: attempt 1 ended: rank 3 failed first: boom" in text
    assert "and its phase becomes Restarting" in text
    before = json.dumps(world.run)
    world.reconcile()
    assert json.dumps(world.run) != before, "telling has changed nothing"
    world.now += 61
    shown = next_steps.as_data(next_steps.next_steps(world.observe()))["actions"]
    assert shown[-1] == {"do": "Create", "kind": "Job", "name": "demo-a2"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [({"suspend": True}, "suspend Job demo-a1"), ({"requests": {"stop": True}}, "suspend Job demo-a1")],
)
def test_what_a_user_asks_for_is_done_next(spec: dict[str, Any], words: str) -> None:
    world = world_of().running()
    world.edit(**spec)
    assert f"1. {words}" in told(world)


def test_a_dead_nodes_pod_is_ended_by_the_operator() -> None:
    world = world_of().running()
    world.dead_nodes = {"node-1"}
    world._ask_to_end(world.pods["demo-a1-1"])
    assert "pod demo-a1-1, if it has not ended by then, counts as stuck" in told(world)
    world.now += 400
    assert "mark pod demo-a1-1 as failed: node node-1 does not answer" in told(world)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_lines_are_as_wide_as_the_terminal(width: int) -> None:
    world = world_of().running()
    world.end_pod("demo-a1-1", 1, message="a long word " * 40)
    world.run_job_controller()
    assert max(map(len, told(world, width=width).splitlines())) <= width


# ---------------------------------------------------------------------------------------------------------- the command


def serve(api: FakeApi, world: World) -> None:
    """What the world has, as the API server would."""
    world.run["metadata"] |= {"creationTimestamp": format_time(world.now), "resourceVersion": "5"}
    api.on("GET", f"{RUNS}/demo", world.run)
    api.on("GET", JOBS, {"items": [*world.jobs.values()], "metadata": {}})
    api.on("GET", PODS, {"items": [*world.pods.values()], "metadata": {}})
    for path in (SERVICES, POLICIES):
        api.on("GET", f"{path}/demo", refusal(404, "NotFound", "no", name="demo"))
    for (kind, name), body in world.others.items():
        if kind == "ConfigMap":
            api.on("GET", f"{CONFIG_MAPS}/{name}", body)


def test_plan_of_a_run_asks_for_what_the_operator_would(api: FakeApi, osctl: Any) -> None:
    world = world_of().running()
    serve(api, world)
    code, out, err = osctl("plan", "demo")
    assert code == 0, err
    assert out.startswith("TrainingRun demo in team: Running\n\nnow: nothing")
    assert "not seen: what rank 0 reports" in err
    assert not api.writes()
    data = json.loads(osctl("plan", "demo", "-o", "json").out)
    assert (data["name"], data["actions"], data["phase"]["now"]) == ("demo", [], "Running")


def test_plan_of_a_new_run_sees_a_name_that_is_taken(api: FakeApi, osctl: Any) -> None:
    world = world_of(profileRef=None)
    serve(api, world)
    for path in (
        RUNS.replace("trainingruns", "trainingprofiles"),
        "/apis/opensora.dev/v1alpha1/clustertrainingprofiles",
    ):
        api.on("GET", path, {"items": [], "metadata": {}})
    steps = next_steps.next_steps(world.observe())
    config = next(name for kind, name in next_steps.places_to_create(steps) if kind == "ConfigMap")
    api.on("GET", f"{CONFIG_MAPS}/{config}", refusal(404, "NotFound", "no", name=config))
    api.on("GET", f"{JOBS}/demo-a1", refusal(404, "NotFound", "no", name="demo-a1"))
    data = json.loads(osctl("plan", "demo", "-o", "json").out)
    assert [action["kind"] for action in data["actions"]] == ["ConfigMap", "Service", "NetworkPolicy", "Job"]
    api.on("GET", f"{SERVICES}/demo", {"kind": "Service", "metadata": {"name": "demo", "uid": "other"}})
    text = " ".join(osctl("plan", "demo").out.split())
    assert "the Service demo in this namespace does not belong to this run" in text
    assert "create" not in text


def test_plan_without_rights_to_pods_ends_with_8(api: FakeApi, osctl: Any) -> None:
    serve(api, world_of().running())
    api.on("GET", PODS, refusal(403, "Forbidden", "alice cannot list pods"))
    code, out, err = osctl("plan", "demo")
    assert (code, out) == (8, "")
    assert "alice cannot list pods" in err


# ------------------------------------------------------------------------------------------------------------ of a file


def config_of(home: Path, **data: Any) -> Object:
    lines = ["path,text,num_frames,height,width", *(f"{n}.mp4,clip {n},20,144,256" for n in range(10))]
    (home / "clips.csv").write_text("\n".join(lines))
    return {
        "device": "cpu",
        "model": {"type": "STDiT3", "hidden_size": 32, "depth": 2, "num_heads": 2},
        "data": {"path": str(home / "clips.csv"), "bucket_config": {"144p": {17: [1.0, 2]}}, "repeats": 4, **data},
        "train": {"steps": 100},
    }


def run_file(home: Path, config: Object, **spec: Any) -> str:
    run = {"apiVersion": "opensora.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": "demo"}}
    run["spec"] = {**MINIMAL_SPEC, "config": {"inline": yaml.safe_dump(config)}, **spec}  # type: ignore[assignment]
    (home / "run.yaml").write_text(yaml.safe_dump(run))
    return str(home / "run.yaml")


def test_plan_of_a_file_tells_layout_and_outlook(osctl: Any, home: Path) -> None:
    limits = {"resources": {"limits": {"nvidia.com/gpu": "2", "memory": "64Gi"}}}
    path = run_file(home, config_of(home), podTemplate=limits, scheduling={"queue": "gpus"})
    code, out, err = osctl("plan", path)
    assert code == 0, err
    for words in (
        "TrainingRun demo\n",
        "ranks    2 nodes with 2 ranks each: 4 in all",
        "queue    gpus",
        "nvidia.com/gpu 2 (4 in all)",
        "memory 64Gi (128Gi in all)",
        "Service/demo",
        "layout   4 shards, zero2",
        "step     4 micro-batches over all ranks",
        "epoch    5 steps, 40 clips; 20 epochs in all",
        "144p/17",
        "not forecast: seconds per step",
    ):
        assert words in out
    (data,) = json.loads(osctl("plan", path, "-o", "json").out)["items"]
    assert (data["worldSize"], data["queue"], data["outlook"]["epoch"]["steps"]) == (4, "gpus", 5)
    state = data["outlook"]["state"]
    assert state["total"] == sum(value for key, value in state.items() if key != "total")
    (bucket,) = data["outlook"]["buckets"]
    assert bucket["rankBytes"] == state["total"] + bucket["activationBytes"]


def test_what_a_search_has_measured_counts(osctl: Any, home: Path) -> None:
    found = BucketResult(batch_size=1, peak_bytes=5 * 2**30, seconds_per_step=0.5, fit=None, evidence=Evidence())
    table = BatchTable(facts={}, headroom_percent=0, objective="LargestBatch", buckets={"144p/17": found})
    (home / "table.json").write_text(table.to_json())
    path = run_file(home, config_of(home, batch_table=str(home / "table.json")))
    out = osctl("plan", path).out
    assert "time     0.5 s/step by the table, 50s for 100 steps" in out
    row = next(line for line in out.splitlines() if line.startswith("  144p/17"))
    assert row.split()[2] == "1"
    assert row.endswith("5 GiB        0.5")


def test_lint_forecasts_what_is_right(osctl: Any, home: Path) -> None:
    path = run_file(home, config_of(home, path="s3://bucket/clips.csv"))
    code, out, err = osctl("lint", path)
    assert (code, out) == (0, "")
    assert err.startswith(f"{path}: TrainingRun demo: ok\n  layout   4 shards, zero2\n")
    assert "the catalogue is in a bucket, which --read-buckets reads" in err
    assert osctl("lint", path, "-q") == (0, "", "")


def test_lint_counts_groups_of_ranks(osctl: Any, home: Path) -> None:
    path = run_file(home, {**config_of(home), "parallel": {"replicas": 3}})
    code, out, _ = osctl("lint", path)
    assert code == 2
    assert "4 ranks do not divide into parallel.replicas=3 groups" in out


def test_a_catalogue_that_is_not_here_is_said(osctl: Any, home: Path) -> None:
    path = run_file(home, config_of(home, path=str(home / "nowhere.csv")))
    assert "not forecast: steps of an epoch: " in osctl("plan", path).out


def test_a_config_is_planned_as_it_is(osctl: Any, home: Path) -> None:
    (home / "stage.yaml").write_text(yaml.safe_dump(config_of(home)))
    out = osctl("plan", "stage.yaml").out
    assert out.startswith(
        "TrainingRun stage\n  ranks    1 node with 1 rank: 1 in all\n  image    that of the cluster's"
    )
