"""The chart as Helm renders it."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import build
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/opensora-operator"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
RELEASE, NAMESPACE = "opensora-operator", "opensora-system"

Object = dict[str, Any]


def helm(*arguments: str, input: str | None = None, kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(build.ensure("helm") / "helm"), *arguments]
    if kubeconfig is not None:
        command += ["--kubeconfig", str(kubeconfig)]
    return subprocess.run(command, input=input, capture_output=True, text=True, timeout=120)


def template(values: Object, *flags: str) -> subprocess.CompletedProcess[str]:
    command = ("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", build.KUBERNETES)
    return helm(*command, *flags, "--values", "-", input=json.dumps(values))


@functools.cache
def rendered(values: str = "{}", *flags: str) -> str:
    answer = template(json.loads(values), *flags)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def render(values: Object | None = None, *flags: str) -> list[Object]:
    """What is rendered, without hooks and definitions unless flags say otherwise."""
    text = rendered(json.dumps(values or {}), *flags)
    return [body for body in yaml.load_all(text, Loader=yaml.CSafeLoader) if body]


def without_definitions(objects: list[Object]) -> list[Object]:
    return [body for body in objects if body["kind"] != "CustomResourceDefinition"]


def of_kind(objects: list[Object], kind: str, name: str = "") -> list[Object]:
    return [body for body in objects if body["kind"] == kind and name in ("", body["metadata"]["name"])]


def deployment(objects: list[Object]) -> Object:
    (found,) = of_kind(objects, "Deployment")
    return found
