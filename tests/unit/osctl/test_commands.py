"""Commands against canned answers: what they ask, what they print, how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import RUNS, FakeApi, refusal
from opensora_operator.wire import format_time
from operator_world import MINIMAL_SPEC, World

FIRST = f"{RUNS}/first"
PODS = "/api/v1/namespaces/team/pods"
CONFIG = "data: {path: s3://b/clips.csv, bucket_config: {64px: {17: [1.0, 4]}}}\ntrain: {steps: 10}\n"


def _run(phase: str | None = "Running", *, reason: str = "", **more: Any) -> dict[str, Any]:
    conditions = []
    if phase == "Failed":
        conditions = [{"type": "Failed", "status": "True", "reason": reason, "message": "it broke"}]
    spec = {"runUri": "s3://b/first", "config": {"inline": CONFIG}, "nodes": 2}
    return {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {
            "name": "first",
            "namespace": "team",
            "uid": "u1",
            "resourceVersion": "5",
            "generation": 1,
            "creationTimestamp": format_time(1_000_000.0),
        },
        "spec": spec | more.pop("spec", {}),
        "status": {} if phase is None else {"phase": phase, "conditions": conditions, "observedGeneration": 1, **more},
    }


TABLE = {
    "columnDefinitions": [
        {"name": "Name", "priority": 0},
        {"name": "Phase", "priority": 0},
        {"name": "Step", "priority": 0},
        {"name": "Queue", "priority": 1},
    ],
    "rows": [
        {"cells": ["first", "Running", 61, "gpu"], "object": {"metadata": {"name": "first", "namespace": "team"}}},
        {"cells": ["second-run", None, None, None], "object": {"metadata": {"name": "x", "namespace": "team"}}},
    ],
    "metadata": {},
}


# ----------------------------------------------------------------------------------------------------------------- get


def test_get_prints_the_servers_table(api: FakeApi, osctl: Any) -> None:
    api.on("GET", RUNS, TABLE)
    assert osctl("get") == (0, "NAME         PHASE     STEP\nfirst        Running   61\nsecond-run\n", "")
    assert "as=Table" in api.requests[0].headers["Accept"]
    wide = osctl("get", "trainingruns", "-o", "wide").out
    assert wide.splitlines()[1] == "first        Running   61     gpu"


def test_get_of_all_namespaces_says_which(api: FakeApi, osctl: Any) -> None:
    api.on("GET", "/apis/opensora.dev/v1alpha1/trainingruns", TABLE)
    lines = osctl("get", "tr", "-A").out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAMESPACE", "team", "team"]


def test_get_as_data_is_the_object_itself(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    assert json.loads(osctl("get", "tr", "first", "-o", "json").out) == _run()
    assert yaml.safe_load(osctl("get", "tr/first", "-o", "yaml").out) == _run()
    assert osctl("get", "tr/first", "-o", "name").out == "trainingrun.opensora.dev/first\n"
    api.on("GET", RUNS, {"items": [_run()], "metadata": {}})
    assert json.loads(osctl("get", "-o", "json").out) == {"apiVersion": "v1", "kind": "List", "items": [_run()]}


def test_the_format_can_be_a_setting(api: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSCTL_OUTPUT", "name")
    api.on("GET", RUNS, {"items": [_run()], "metadata": {}})
    assert osctl("get").out == "trainingrun.opensora.dev/first\n"


def test_get_without_rights_ends_with_8(api: FakeApi, osctl: Any) -> None:
    api.on("GET", RUNS, refusal(403, "Forbidden", "alice cannot list trainingruns"))
    code, out, err = osctl("get")
    assert (code, out) == (8, "")
    assert err == "error: alice cannot list trainingruns\nhint: ask whoever runs the cluster for this right\n"


def test_a_cluster_without_our_kinds_ends_with_3(api: FakeApi, osctl: Any) -> None:
    code, _, err = osctl("get")
    assert code == 3
    assert "is the operator installed?" in err


# -------------------------------------------------------------------------------------------------------------- status


def test_status_tells_the_story_with_few_requests(api: FakeApi, osctl: Any) -> None:
    world = World().running()
    world.run["metadata"] |= {"creationTimestamp": format_time(world.now), "namespace": "team"}
    api.on("GET", f"{RUNS}/demo", world.run)
    api.on("GET", PODS, {"items": [*world.pods.values()], "metadata": {}})
    result = osctl("status", "demo")
    assert result.code == 0
    assert result.out.startswith("TrainingRun demo in team: Running")
    assert "nodes   2 of 2 ready" in result.out
    assert len(api.requests) <= 5
    data = json.loads(osctl("status", "demo", "-o", "json").out)
    assert [pod["state"] for pod in data["pods"]] == ["Running", "Running"]


def test_status_without_rights_to_pods_says_so(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    api.on("GET", PODS, refusal(403, "Forbidden", "no"))
    result = osctl("status", "first")
    assert result.code == 0
    assert "not seen: pods, since you may not list them" in result.out


def test_status_of_nothing_ends_with_3(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, refusal(404, "NotFound", 'trainingruns "first" not found', name="first"))
    code, out, err = osctl("status", "first")
    assert (code, out) == (3, "")
    assert err.startswith('error: trainingruns "first" not found\nhint: ')


# ---------------------------------------------------------------------------------------------------------------- wait


@pytest.mark.parametrize(
    ("run", "goal", "code"),
    [
        (_run("Succeeded"), "complete", 0),
        (_run("Failed", reason="RestartBudgetExceeded"), "complete", 6),
        (_run("Failed", reason="Cancelled"), "complete", 7),
        (_run("Failed", reason="StartupDeadlineExceeded"), "complete", 9),
        (_run("Failed", reason="NoProgress"), "complete", 10),
        (_run("Failed", reason="NoProgress"), "failed", 0),
        (_run("Succeeded"), "failed", 1),
        (_run(progress={"step": 100}), "step>=100", 0),
        (_run("Failed", reason="Hang", progress={"step": 99}), "step>=100", 6),
        (_run("Failed", reason="Hang"), "condition=Failed", 0),
        (_run("Failed", reason="Hang"), "condition=failed=true", 6),
    ],
)
def test_the_exit_code_of_wait_is_the_answer(api: FakeApi, osctl: Any, run: Any, goal: str, code: int) -> None:
    api.on("GET", FIRST, run)
    result = osctl("wait", "first", "--for", goal, "-q")
    assert result.code == code
    assert bool(result.out) == (code == 0)


def test_wait_gives_up_with_5(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    result = osctl("wait", "first", "--timeout", "0s", "-q")
    assert (result.code, result.out) == (5, "")
    assert "first is not complete after 0s" in result.err


def test_wait_follows_changes(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run("Pending"))
    changes = [{"type": "MODIFIED", "object": _run(phase)} for phase in ("Running", "Succeeded")]
    api.on("GET", RUNS, "\n".join(map(json.dumps, changes)))
    result = osctl("wait", "first", "--timeout", "10s")
    assert result == (
        0,
        "trainingrun.opensora.dev/first complete\n",
        "first: Pending\nfirst: Running\nfirst: Succeeded\n",
    )


def test_wait_for_a_run_that_is_deleted_ends_with_3(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    api.on("GET", RUNS, json.dumps({"type": "DELETED", "object": _run()}))
    assert osctl("wait", "first", "--timeout", "10s").code == 3


def test_wait_outlasts_an_api_server_that_is_away(api: FakeApi, osctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osctl.waiting._POLL_SECONDS", 0.01)
    away = [refusal(429, "TooManyRequests", "busy")] * 9
    api.on("GET", FIRST, _run(), *away, (200, _run("Succeeded")))
    api.on("GET", RUNS, away[0])
    result = osctl("wait", "first", "--timeout", "60s")
    assert (result.code, result.out) == (0, "trainingrun.opensora.dev/first complete\n")
    assert result.err == "first: Running\nbusy; trying again\nfirst: Succeeded\n"


@pytest.mark.parametrize(
    "words", [("--for", "ready"), ("--for", "step>=x"), ("--timeout", "soon"), ("--timeout", "-1s")]
)
def test_wait_refuses_what_it_does_not_understand(osctl: Any, words: tuple[str, ...]) -> None:
    assert osctl("wait", "first", *words).code == 2


# ------------------------------------------------------------------------------------------------------------- changes


@pytest.mark.parametrize(
    ("words", "spec", "said"),
    [
        (("suspend", "first"), {"suspend": True}, "trainingrun.opensora.dev/first suspended\n"),
        (("stop", "first", "--yes"), {"requests": {"stop": True}}, "trainingrun.opensora.dev/first stops\n"),
    ],
)
def test_a_change_is_one_patch(api: FakeApi, osctl: Any, words: tuple[str, ...], spec: Any, said: str) -> None:
    api.on("GET", FIRST, _run())
    api.on("PATCH", FIRST, _run())
    result = osctl(*words)
    assert (result.code, result.out) == (0, said)
    assert api.writes() == [("PATCH", FIRST, {"spec": spec})]


def test_resume_of_a_run_that_is_not_suspended_changes_nothing(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    assert osctl("resume", "first") == (0, "trainingrun.opensora.dev/first resumed already\n", "")
    assert api.writes() == []


@pytest.mark.parametrize("command", ["suspend", "resume", "restart", "stop"])
def test_a_run_that_is_over_cannot_be_changed(api: FakeApi, osctl: Any, command: str) -> None:
    api.on("GET", FIRST, _run("Succeeded"))
    result = osctl(command, "first")
    assert result.code == 4
    assert "first has succeeded" in result.err
    assert api.writes() == []


@pytest.mark.parametrize(
    ("spec", "patches"),
    [
        ({}, [{"nodes": 4, "suspend": True}, {"suspend": False}]),
        ({"suspend": True}, [{"nodes": 4}]),
        ({"elastic": {"allowedNodes": [2, 4]}}, [{"nodes": 4}]),
        ({"nodes": 4}, []),
    ],
    ids=["running", "suspended", "elastic", "the same"],
)
def test_scale_suspends_only_where_it_must(api: FakeApi, osctl: Any, spec: Any, patches: list[Any]) -> None:
    api.on("GET", FIRST, _run(spec=spec))
    api.on("PATCH", FIRST, _run())
    assert osctl("scale", "first", "--nodes", "4").code == 0
    assert api.writes() == [("PATCH", FIRST, {"spec": patch}) for patch in patches]


def test_scale_that_cannot_resume_says_how_to(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    api.on("PATCH", FIRST, (200, _run()), (500, "oops"))
    result = osctl("scale", "first", "--nodes", "4")
    assert result.code == 1
    assert "`osctl resume first`" in result.err


def test_each_restart_is_a_new_request(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    api.on("PATCH", FIRST, _run())
    for _ in range(2):
        assert osctl("restart", "first", "--exclude-node", "gpu-7").code == 0
    asked = [body["spec"]["requests"]["restart"] for _, _, body in api.writes()]
    assert {each["excludeNode"] for each in asked} == {"gpu-7"}
    assert len({each["id"] for each in asked}) == 2


@pytest.mark.parametrize("command", [("stop",), ("delete",), ("suspend",), ("restart",), ("scale", "--nodes", "9")])
def test_a_dry_run_of_a_change_sends_nothing(api: FakeApi, osctl: Any, command: tuple[str, ...]) -> None:
    api.on("GET", FIRST, _run())
    result = osctl(*command, "first", "--dry-run")
    assert result.code == 0
    assert result.out.endswith("(dry run: client)\n")
    assert api.writes() == []


def test_a_dry_run_on_the_server_keeps_nothing(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    api.on("PATCH", FIRST, _run())
    assert osctl("suspend", "first", "--dry-run=server").code == 0
    assert "dryRun=All" in api.requests[-1].query


@pytest.mark.parametrize("command", ["stop", "delete"])
def test_what_cannot_be_undone_is_not_done_unasked(api: FakeApi, osctl: Any, command: str) -> None:
    api.on("GET", FIRST, _run())
    result = osctl(command, "first")
    assert result.code == 2
    assert "--yes" in result.err
    assert api.writes() == []


def test_delete_deletes_what_it_has_looked_at(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    api.on("DELETE", FIRST, {})
    result = osctl("delete", "first", "--yes")
    assert (result.code, result.out) == (0, "trainingrun.opensora.dev/first deleted\n")
    assert api.writes()[0][2]["preconditions"] == {"uid": "u1"}


def test_delete_of_several_checks_all_first(api: FakeApi, osctl: Any) -> None:
    api.on("GET", FIRST, _run())
    api.on("GET", f"{RUNS}/second", refusal(404, "NotFound", "no second", name="second"))
    assert osctl("delete", "first", "second", "--yes").code == 3
    assert api.writes() == []


# --------------------------------------------------------------------------------------------------------- train, lint


def _manifest(home: Path, **spec: Any) -> str:
    run = {"apiVersion": "opensora.dev/v1alpha1", "kind": "TrainingRun", "metadata": {"name": "demo"}}
    run["spec"] = {**MINIMAL_SPEC, "config": {"inline": CONFIG}, **spec}  # type: ignore[assignment]
    (home / "run.yaml").write_text(yaml.safe_dump(run))
    return str(home / "run.yaml")


def test_train_submits_the_manifest_with_what_flags_change(api: FakeApi, osctl: Any, home: Path) -> None:
    api.on("POST", RUNS, _run())
    flags = ["--name", "other", "--nodes", "3", "--set", "optim.lr=1e-3", "--queue", "gpu", "--profile", "h200"]
    result = osctl("train", _manifest(home), *flags, "--data", "s3://bucket/other.csv", "--suspend")
    assert (result.code, result.out) == (0, "trainingrun.opensora.dev/first created\n"), result.err
    ((_, _, body),) = api.writes()
    spec = body["spec"]
    assert body["metadata"] == {"name": "other", "namespace": "team"}
    assert (spec["nodes"], spec["suspend"], spec["scheduling"]) == (3, True, {"queue": "gpu"})
    assert spec["config"]["overrides"] == ["optim.lr=1e-3"]
    assert (spec["profileRef"], spec["data"]) == ({"name": "h200"}, {"catalogue": "s3://bucket/other.csv"})
    assert "fieldValidation=Strict" in api.requests[-1].query


@pytest.mark.parametrize("suffix", [".py", ".yaml"])
def test_train_makes_a_run_of_a_config(
    api: FakeApi, osctl: Any, home: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("OSCTL_RUN_URI", "s3://bucket/runs/{name}")
    python = "data = dict(path='s3://b/clips.csv', bucket_config={'64px': {17: (1.0, 4)}})\ntrain = dict(steps=10)\n"
    (home / f"My_Stage.1{suffix}").write_text(python if suffix == ".py" else CONFIG)
    api.on("POST", RUNS, _run())
    result = osctl(
        "train", f"My_Stage.1{suffix}", "--image", "example.com/x:1", "--set", "train.steps=20", "--nodes", "2"
    )
    assert result.code == 0, result.err
    ((_, _, body),) = api.writes()
    assert body["metadata"]["name"] == "my-stage-1"
    assert body["spec"]["runUri"] == "s3://bucket/runs/my-stage-1"
    assert (body["spec"]["image"], body["spec"]["nodes"]) == ("example.com/x:1", 2)
    inline = yaml.safe_load(body["spec"]["config"]["inline"])
    assert inline["train"]["steps"] == 20
    assert inline["data"]["path"] == "s3://b/clips.csv"


def test_a_dry_run_shows_what_the_operator_creates(osctl: Any, home: Path) -> None:
    world = World(config={"inline": CONFIG}, progress_url=None)
    world.reconcile()
    made = {body["metadata"]["name"]: body["spec"] for body in world.jobs.values()}
    result = osctl("train", _manifest(home), "--dry-run", "-n", "team", "-o", "json")
    assert result.code == 0, result.err
    shown = json.loads(result.out)["items"]
    assert [body["kind"] for body in shown] == ["TrainingRun", "ConfigMap", "Service", "NetworkPolicy", "Job"]
    job = shown[-1]
    ours, theirs = job["spec"], made["demo-a1"]
    for spec in (ours, theirs):  # the object does not exist yet, so nobody knows its UID
        labels = spec["template"]["metadata"]["labels"]
        assert labels.pop("opensora.dev/uid")
    assert json.loads(json.dumps(ours).replace("00000000-0000-0000-0000-000000000000", "run-uid")) == theirs


def test_a_dry_run_that_the_operator_would_refuse_says_why(osctl: Any, home: Path) -> None:
    result = osctl("train", _manifest(home, image=None), "--dry-run")
    assert (result.code, result.out) == (1, "")
    assert "spec.image is missing" in result.err
    assert "--dry-run=server" in result.err


def test_a_profile_beside_the_run_counts(osctl: Any, home: Path) -> None:
    path = _manifest(home, image=None)
    profile = {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "ClusterTrainingProfile",
        "metadata": {"name": "all"},
        "spec": {"default": True, "image": "example.com/from-profile:1"},
    }
    with open(path, "a") as file:
        file.write("---\n" + yaml.safe_dump(profile))
    result = osctl("train", path, "--dry-run")
    assert result.code == 0, result.err
    assert "image: example.com/from-profile:1" in result.out


def test_a_config_that_pods_would_refuse_is_not_sent(api: FakeApi, osctl: Any, home: Path) -> None:
    result = osctl("train", _manifest(home), "--set", "train.stepps=3")
    assert result.code == 2
    assert "train.stepps" in result.err
    assert api.writes() == []


def test_a_run_of_that_name_is_a_conflict(api: FakeApi, osctl: Any, home: Path) -> None:
    api.on("POST", RUNS, refusal(409, "AlreadyExists", "demo already exists", name="demo"))
    result = osctl("train", _manifest(home))
    assert result.code == 4
    assert "hint: choose another name" in result.err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("a: [", "line 1"),
        ("kind: Pod\napiVersion: v1\nmetadata: {name: x}", "none of ours"),
        ("kind: TrainingRun\napiVersion: opensora.dev/v9\nmetadata: {name: x}", "is of opensora.dev/v9"),
        ("kind: TrainingRun\napiVersion: opensora.dev/v1alpha1\nmetadata: {}", "no metadata.name"),
        ("kind: ConfigMap\napiVersion: v1\nmetadata: {name: x}", "has no TrainingRun"),
        ("kind: TrainingRun\napiVersion: opensora.dev/v1alpha1\nmetadata: {name: x}", "spec.runUri: it is missing"),
        ("just words", "no kind and no metadata"),
    ],
)
def test_a_file_that_is_no_run_is_named(osctl: Any, home: Path, text: str, complaint: str) -> None:
    (home / "run.yaml").write_text(text)
    result = osctl("train", "run.yaml", "--dry-run")
    assert result.code == 2
    assert complaint in result.err
    assert "Traceback" not in result.err


def test_a_file_that_is_not_there_is_named(osctl: Any) -> None:
    result = osctl("train", "nowhere.yaml")
    assert result.code == 2
    assert result.err.startswith("error: nowhere.yaml cannot be read: No such file or directory\n")


def test_lint_lists_every_problem(osctl: Any, home: Path) -> None:
    result = osctl("lint", _manifest(home, nodes=0, imag="x"))
    assert result.code == 2
    assert "TrainingRun demo: spec.nodes: 0 is below 1\n" in result.out
    assert "TrainingRun demo: spec.imag: there is no such field; image is near\n" in result.out
    assert "error: 2 problems" in result.err


def test_lint_of_what_is_right_ends_with_0(osctl: Any, home: Path) -> None:
    path = _manifest(home)
    code, out, err = osctl("lint", path)
    assert (code, out) == (0, "")
    assert err.startswith(f"{path}: TrainingRun demo: ok\n")


# ------------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("spec.nodes", ["TrainingRun.spec.nodes (integer)", "at least 1", "at most 4096", "default 1"]),
        ("sj.spec.prompts", ["SampleJob.spec.prompts (object)", "inline (list of string)"]),
        ("tr.status.attempts", ["list of object", "exitCode (integer)"]),
        ("config.optim.lr", ["optim.lr = 0.0001 (number)", "Learning rate"]),
    ],
)
def test_explain_tells_type_limits_and_meaning(osctl: Any, field: str, words: list[str]) -> None:
    result = osctl("explain", field)
    assert result.code == 0
    for word in words:
        assert word in result.out


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("spec.nods", "did you mean nodes?"),
        ("config.optim.lrr", "did you mean config.optim.lr?"),
        ("spec.nodes.x", "no fields"),
    ],
)
def test_explain_of_what_does_not_exist_ends_with_3(osctl: Any, field: str, hint: str) -> None:
    result = osctl("explain", field)
    assert result.code == 3
    assert hint in result.err
