"""What stands here for the things of a cluster, and what cannot be had here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from opensora_operator.plans import Object
from operator_world import MINIMAL_SPEC
from osctl import local_machine, local_state
from osctl.errors import ExitCode, OsctlError, UsageError
from osctl.forecast import Files, Forecast, forecast
from osctl.layout import container_of, job_of
from osctl.local_machine import Gpus, differences, gpus_for, gpus_here
from osctl.local_pods import LocalPods, Rendering, variables_of
from osctl.manifests import RUN
from osctl.validation import schema_of, with_defaults

CONFIG = "device: DEVICE\ndata: {path: /clips.csv, bucket_config: {64px: {17: [1.0, 4]}}}\ntrain: {steps: 10}\n"
CONFIG_MAP: Object = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "more"},
    "data": {"A": "1", "B": "2"},
}


def planned(*others: Object, device: str = "auto", **spec: Any) -> Forecast:
    """What the operator makes of a run."""
    schema = schema_of(RUN)["properties"]["spec"]
    given = {**MINIMAL_SPEC, "config": {"inline": CONFIG.replace("DEVICE", device)}, **spec}
    body = {"apiVersion": "opensora.dev/v1alpha1", "kind": RUN, "metadata": {"name": "demo"}}
    return forecast({**body, "spec": with_defaults(given, schema)}, Files(others), namespace="team")


def pod_of(plan: Forecast) -> Object:
    """A pod of its first attempt."""
    template: Object = job_of(plan)["spec"]["template"]
    metadata = {"name": "demo-a1-1", "uid": "u", "namespace": "team", **template["metadata"]}
    return {"metadata": metadata, "spec": {**template["spec"], "nodeName": "here"}}


def variables(plan: Forecast, *others: Object) -> dict[str, str]:
    return variables_of(pod_of(plan), container_of(plan), Files(others))


# --------------------------------------------------------------------------------------------------------- rendering


def test_only_what_cannot_be_the_same_is_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", "RANK": "7", "OPENSORA_ATTEMPT": "9", "HOME": "/home/me"})
    plan = planned(podTemplate={"env": [{"name": "MINE", "value": "/etc/opensora/run/config.yaml"}]})
    container, given = container_of(plan), variables(plan)
    here = Rendering(folder=tmp_path, port=2345, gpus=("2", "3"), index=1)
    assert here.command(container, given) == [
        sys.executable, "-m", "opensora.launch", "opensora.train", f"{tmp_path}/config.yaml",
        *[word for word in container["args"] if "=" in word],
    ]  # fmt: skip
    got = here.environment(given)
    assert {name: got.pop(name) for name in ("PATH", "HOME", "MINE")} == {
        "PATH": "/bin", "HOME": "/home/me", "MINE": f"{tmp_path}/config.yaml",
    }  # fmt: skip
    different = {
        "OPENSORA_MASTER_ADDR": "127.0.0.1",
        "OPENSORA_MASTER_PORT": "2345",
        "OPENSORA_TERMINATION_LOG": f"{tmp_path}/termination-log",
        "JOB_COMPLETION_INDEX": "1",
        "CUDA_VISIBLE_DEVICES": "2,3",
    }
    assert {name: got.pop(name) for name in different} == different
    rendered = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    fields = {"OPENSORA_POD_NAME": "demo-a1-1", "OPENSORA_POD_UID": "u", "OPENSORA_NODE_NAME": "here"}
    assert got == fields | {name: rendered[name] for name in rendered if name not in different and name != "MINE"}


def test_a_rank_does_not_report_to_an_operator(tmp_path: Path) -> None:
    here = Rendering(folder=tmp_path, port=1, gpus=None, index=0)
    given = {"OPENSORA_PROGRESS_URL": "https://x", "OPENSORA_PROGRESS_TOKEN_FILE": "/t", "A": "b"}
    assert {"OPENSORA_PROGRESS_URL", "OPENSORA_PROGRESS_TOKEN_FILE"}.isdisjoint(here.environment(given))
    assert here.environment(given)["A"] == "b"


def test_variables_are_put_together_as_the_kubelet_does() -> None:
    env = [
        {"name": "FIRST", "value": "a$b"},
        {"name": "SECOND", "value": "$(FIRST)/$$(FIRST)/$(NOT_THERE)"},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "KIND", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['opensora.dev/kind']"}}},
        {"name": "KEY", "valueFrom": {"configMapKeyRef": {"name": "more", "key": "B"}}},
        {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}},
    ]
    sources = [{"configMapRef": {"name": "more"}, "prefix": "X_"}, {"configMapRef": {"name": "no", "optional": True}}]
    got = variables(planned(podTemplate={"env": env, "envFrom": sources}), CONFIG_MAP)
    assert got["SECOND"] == "a$b/$(FIRST)/$(NOT_THERE)"
    assert (got["IP"], got["KIND"], got["KEY"], got["X_A"]) == ("127.0.0.1", "TrainingRun", "2", "1")
    assert "NONE" not in got


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
            ("KEY comes from key k of the Secret s", "set KEY in your environment"),
        ),
        (
            {"env": [{"name": "KEY", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}}]},
            ("key k of the ConfigMap m", "manifest into the run file"),
        ),
        ({"envFrom": [{"configMapRef": {"name": "m"}}]}, ("ConfigMap m, which is not here", "manifest")),
    ],
)
def test_what_is_only_in_a_cluster_is_named_before_the_start(
    tmp_path: Path, template: Object, words: tuple[str, str]
) -> None:
    plan = planned(podTemplate=template)
    pods = LocalPods(tmp_path, Files(), gpus=Gpus(None, 0), show=print)
    with pytest.raises(UsageError) as caught:
        pods.environment(job_of(plan)["spec"]["template"], "team")
    pods.close()
    assert words[0] in caught.value.message
    assert words[1] in str(caught.value.hint)


def test_a_secret_key_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "mine")
    env = [{"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}}]
    assert variables(planned(podTemplate={"env": env}))["WANDB_API_KEY"] == "mine"


# ----------------------------------------------------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "3,1"}, ["3", "1"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, ["1"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-abc"}, ["GPU-abc"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(tmp_path: Path, environment: dict[str, str], expected: list[str]) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    assert gpus_here(environment, tmp_path) == expected


@pytest.mark.parametrize(
    ("spec", "there", "expected"),
    [
        ({"device": "cpu"}, "0,1", Gpus((), 0)),
        ({}, "", Gpus(None, 0)),
        ({"nodes": 2, "procsPerNode": 1}, "0,1", Gpus(("0", "1"), 1)),
        (
            {"nodes": 1, "podTemplate": {"resources": {"limits": {"nvidia.com/gpu": "2"}}}},
            "4,5,6",
            Gpus(("4", "5", "6"), 2),
        ),
    ],
)
def test_pods_get_gpus_of_their_own(
    spec: dict[str, Any], there: str, expected: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", there)
    assert gpus_for(planned(**spec)) == expected


@pytest.mark.parametrize(
    ("spec", "there", "words"),
    [
        ({"nodes": 2, "procsPerNode": 2}, "0", "2 nodes with 2 GPUs each: this machine has 1"),
        ({"device": "cuda", "nodes": 1, "procsPerNode": 1}, "", "1 node with 1 GPU each: this machine has none"),
        ({"nodes": 1, "podTemplate": {"resources": {"limits": {"nvidia.com/gpu": "8"}}}}, "", "8 GPUs"),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    spec: dict[str, Any], there: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", there)
    with pytest.raises(OsctlError, match=words) as caught:
        gpus_for(planned(**spec))
    assert caught.value.exit_code == ExitCode.NO_CAPACITY


def test_what_has_no_effect_is_said() -> None:
    profile = {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "ClusterTrainingProfile",
        "metadata": {"name": "all"},
        "spec": {
            "default": True,
            "storage": {"secretRef": {"name": "keys"}},
            "podTemplate": {"nodeSelector": {"a": "b"}},
        },
    }
    volumes = [{"name": "clips", "nfs": {"server": "s", "path": "/p"}}]
    plan = planned(
        profile, podTemplate={"volumes": volumes, "resources": {"limits": {"memory": "1Gi"}}}, scheduling={"queue": "q"}
    )
    said = "\n".join(differences(plan, image="example.com/x:1"))
    for words in (
        "Secret keys",
        "example.com/x:1",
        "limits of memory",
        "the queue",
        "placement",
        "(clips)",
        "/dev/shm",
    ):
        assert words in said
    assert "image" not in "\n".join(differences(planned(), image=None))


# ------------------------------------------------------------------------------------------------------- the command


def _file(home: Path, **spec: Any) -> str:
    spec = {**MINIMAL_SPEC, "config": {"inline": CONFIG.replace("DEVICE", "cpu")}, **spec}
    run = {"apiVersion": "opensora.dev/v1alpha1", "kind": RUN, "metadata": {"name": "demo"}, "spec": spec}
    (home / "run.yaml").write_text(yaml.safe_dump(run))
    return str(home / "run.yaml")


def test_without_torch_the_extra_is_named(osctl: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_machine.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    code, out, err = osctl("train", _file(home), "--local")
    assert (code, out) == (1, "")
    assert err == 'error: training on this machine needs the extra `train`\nhint: pip install "opensora[train]"\n'


@pytest.mark.parametrize(
    ("spec", "flags", "code", "words"),
    [
        ({}, ["--suspend"], 2, "demo is suspended"),
        ({"profileRef": {"name": "h200"}}, [], 1, "there is no ClusterTrainingProfile h200"),
        ({"config": {"ref": {"configMap": "c", "key": "k"}}}, [], 1, "there is no ConfigMap c"),
        ({"managedBy": "kueue.x-k8s.io/multikueue"}, [], 1, "the operator would create nothing"),
        ({}, ["--set", "device=cuda"], 9, "this machine has none"),
    ],
)
def test_what_cannot_start_here_is_refused(
    osctl: Any, home: Path, monkeypatch: pytest.MonkeyPatch, spec: Any, flags: list[str], code: int, words: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = osctl("train", _file(home, **spec), "--local", *flags)
    assert result.code == code, result.err
    assert words in result.err
    assert "Traceback" not in result.err
    assert not (home / ".local").exists()


def test_one_name_is_trained_once_at_a_time(osctl: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    with local_state.own_folder("demo") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        result = osctl("train", _file(home), "--local")
    assert result.code == 4
    assert "another osctl on this machine trains demo" in result.err


def test_status_of_a_local_run(osctl: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    assert osctl("status", "demo", "--local").code == 3
    metadata = {"name": "demo", "namespace": "team", "uid": "u", "generation": 1}
    run = {"metadata": {**metadata, "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": {**MINIMAL_SPEC}}
    run["status"] = {"phase": "Running", "attempt": 1, "observedGeneration": 1}  # type: ignore[assignment]
    pod = pod_of(planned())
    with local_state.own_folder("demo") as folder:
        local_state.write(folder, run, [pod])
        told = osctl("status", "demo", "--local")
        assert told.code == 0, told.err
        assert told.out.startswith("TrainingRun demo in team: Running")
        assert "not seen" not in told.out
        assert "OPENSORA" not in (folder / "run.json").read_text(), "variables may be secrets"
    assert "the osctl that ran it is gone" in osctl("status", "demo", "--local").out
