"""Manifests without a cluster: schema and rules say what the API server says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from opensora_operator.api import KINDS
from osctl.cel import CelError, compile_rule
from osctl.checks import check
from osctl.validation import schema_of, validate

ROOT = Path(__file__).parents[3]
CONFIG = "data: {path: a.csv, bucket_config: {64px: {17: [1.0, 4]}}}\ntrain: {steps: 1}"
SPEC: dict[str, Any] = {"runUri": "s3://bucket/run", "config": {"inline": CONFIG}}


def _run(name: str = "first", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "opensora.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name},
        "spec": copy.deepcopy(SPEC) | spec,
    }


def _rules(schema: Any) -> list[str]:
    found = [rule["rule"] for rule in schema.get("x-kubernetes-validations", ())]
    found += [
        rule["messageExpression"] for rule in schema.get("x-kubernetes-validations", ()) if "messageExpression" in rule
    ]
    for inner in [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]:
        if isinstance(inner, dict):
            found += _rules(inner)
    return found


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_every_rule_of_every_kind_can_be_read(kind: str) -> None:
    rules = _rules(schema_of(kind))
    assert rules or kind.endswith("Profile")
    for rule in rules:
        compile_rule(rule)


@pytest.mark.parametrize("path", sorted((ROOT / "manifests/samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_samples_are_right(path: Path) -> None:
    for body in yaml.safe_load_all(path.read_text()):
        assert check(body).problems == ()


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"nodes": 0}, "spec.nodes: 0 is below 1"),
        ({"nodes": 4097}, "spec.nodes: 4097 is above 4096"),
        ({"nodes": "two"}, "spec.nodes: 'two' is no integer"),
        ({"nodes": True}, "spec.nodes: True is no integer"),
        ({"node": 2}, "spec.node: there is no such field; nodes is near"),
        ({"runUri": None}, "spec.runUri: it is missing"),
        ({"runUri": "gs://x"}, "spec.runUri: expected s3://bucket/path, or a path in the container"),
        ({"entrypoint": "fly"}, "spec.entrypoint: 'fly' is none of 'train', 'train_vae'"),
        ({"procsPerNode": "some"}, "spec.procsPerNode: 'some' does not match ^(auto)$"),
        ({"procsPerNode": 1.5}, "spec.procsPerNode: 1.5 is neither a whole number nor a text"),
        (
            {"config": {"inline": "a", "file": "b.py"}},
            "spec.config: give exactly one config source: inline, ref or file",
        ),
        ({"config": {}}, "spec.config: give exactly one config source: inline, ref or file"),
        ({"elastic": {"allowedNodes": [2, 4]}}, "spec: nodes must be one of elastic.allowedNodes"),
        (
            {"nodes": 3, "procsPerNode": 1, "parallelism": {"sequence": 2}},
            "spec: the world size, nodes x procsPerNode, must divide by sequence x tensor x pipeline",
        ),
        (
            {"checkpoint": {"sigtermBudgetSeconds": 180}},
            "spec: terminationGracePeriodSeconds must cover checkpoint.sigtermBudgetSeconds plus 30 s",
        ),
        (
            {"watchdog": {"stepTimeoutFactor": 1}},
            "spec.watchdog.stepTimeoutFactor: watchdog.stepTimeoutFactor must be at least 2",
        ),
        (
            {"podTemplate": {"env": [{"name": "RANK", "value": "1"}]}},
            "spec.podTemplate.env[0]: RANK is set by the operator: remove it",
        ),
        ({"data": {"cache": {"path": "relative"}}}, "spec.data.cache.path"),
        ({"config": {"inline": "x", "overrides": ["novalue"]}}, "spec.config.overrides[0]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_field_is_named_with_its_value_and_the_rule(spec: dict[str, Any], problem: str) -> None:
    found = [str(each) for each in validate(_run(**spec))]
    assert any(each.startswith(problem) for each in found), found


def test_a_right_run_has_no_problems() -> None:
    spec = {
        "nodes": 4,
        "procsPerNode": 2,
        "parallelism": {"sequence": 4},
        "elastic": {"allowedNodes": [2, 4]},
        "watchdog": {"stepTimeoutFactor": 2},
    }
    assert validate(_run(**spec)) == []


@pytest.mark.parametrize("name", ["Upper", "1st", "a" * 49, "end-"])
def test_names_from_which_no_pod_names_can_be_made_are_refused(name: str) -> None:
    assert [problem.field for problem in validate(_run(name))] == ["metadata.name"]


def test_the_config_is_read_as_the_pods_read_it() -> None:
    assert check(_run()).problems == ()
    wrong = check(_run(config={"inline": CONFIG.replace("steps", "stepps")}))
    assert len(wrong.problems) == 1
    assert "train.stepps" in wrong.problems[0].message
    by_override = check(_run(config={**SPEC["config"], "overrides": ["optim.lr=fast"]}))
    assert "optim.lr" in by_override.problems[0].message


def test_what_needs_the_cluster_is_said_and_is_no_problem() -> None:
    report = check(_run(config={"ref": {"configMap": "settings", "key": "a.yaml"}}))
    assert report.problems == ()
    assert "there is no ConfigMap settings here" in report.unknown[0]
    beside = {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a.yaml": "train: {}"}}
    assert (
        "data.path"
        in check(_run(config={"ref": {"configMap": "settings", "key": "a.yaml"}}), others=[beside]).problems[0].message
    )


@pytest.mark.parametrize(
    ("text", "self", "value"),
    [
        ("1 + 2 * 3 == 7 && !(1 > 2)", None, True),
        ("has(self.a) ? self.a : 9", {}, 9),
        ("has(self.a) ? self.a : 9", {"a": 1}, 1),
        ("self.all(k, k.size() <= 2 && k.matches('^a'))", ["a", "ab"], True),
        ("self.filter(k, k > 1).size()", [1, 2, 3], 2),
        ("type(self) == string || self % 2 == 0", "auto", True),
        ("self.x == 1 || true", {}, True),
        ("self in ['a', 'b']", "b", True),
        ("self.matches(r'^\\d+$')", "12", True),
        ("-self + 3", 1, 2),
    ],
)
def test_cel_means_what_it_means_in_kubernetes(text: str, self: Any, value: Any) -> None:
    assert compile_rule(text)({"self": self}) == value


@pytest.mark.parametrize("text", ["self.", "self.foo(1)", "(1", "1 2", "f(1)", "self ~ 1", "has(1)", ""])
def test_cel_that_is_not_known_is_an_error(text: str) -> None:
    with pytest.raises(CelError):
        compile_rule(text)
