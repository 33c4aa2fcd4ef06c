"""To the wire and back."""

from __future__ import annotations

import dataclasses
import json
import random
import typing
from typing import Any, Literal

import pytest
from opensora_operator.api import (
    KINDS,
    AttemptStatus,
    Condition,
    ConfigSource,
    SampleJobSpec,
    TrainingRunSpec,
    TrainingRunStatus,
)
from opensora_operator.fields import (
    TimeMarker,
    fields_of,
    is_int_or_text,
    is_optional,
    split,
    unwrap_optional,
    words_of,
)
from opensora_operator.pod_template import EmptyDirVolume, LabelSelector, PodAffinityTerm, PodTemplate, Volume
from opensora_operator.wire import WireError, from_wire, to_wire

LEAST = {"runUri": "s3://bucket/run", "config": {"inline": "a: 1"}}


def _any_value(hint: Any, markers: tuple[Any, ...], draw: random.Random, *, least: int = 0) -> Any:
    """Any value that a field of this type can have."""
    hint, markers = unwrap_optional(hint, markers)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _any_object(hint, draw)
    if typing.get_origin(hint) is tuple:
        item = split(typing.get_args(hint)[0])
        return tuple(_any_value(*item, draw) for _ in range(draw.randint(least, 2)))
    if typing.get_origin(hint) is dict:
        item = split(typing.get_args(hint)[1])
        return {f"key{number}": _any_value(*item, draw) for number in range(draw.randint(least, 2))}
    if any(isinstance(marker, TimeMarker) for marker in markers):
        return float(draw.randrange(2**32))
    number = draw.choice((0, 1, -1, 2**53, draw.randrange(10**6)))
    if is_int_or_text(hint) or typing.get_origin(hint) is Literal:
        return draw.choice([*words_of(hint), *([number] if is_int_or_text(hint) else [])])
    texts = ("", "text", "Grüße 你好", "a: [b]\n", "null", "1")
    values: dict[Any, Any] = {
        bool: draw.random() < 0.5,
        int: number,
        float: draw.uniform(-1e9, 1e9),
        str: draw.choice(texts),
    }
    return values[hint]


def _any_object(cls: type, draw: random.Random) -> Any:
    values: dict[str, Any] = {}
    for info in fields_of(cls):
        if not is_optional(info.hint):
            values[info.name] = _any_value(info.hint, info.markers, draw)
        elif draw.random() < 0.5:
            # No empty list where it may also be missing: the wire knows one of the two.
            values[info.name] = _any_value(info.hint, info.markers, draw, least=1)
    return cls(**values)


@pytest.mark.parametrize("cls", [cls for kind in KINDS for cls in (kind.spec, kind.status) if cls is not None])
def test_what_is_written_is_read_as_it_was(cls: type) -> None:
    draw = random.Random(4)
    for _ in range(100):
        value = _any_object(cls, draw)
        assert from_wire(cls, json.loads(json.dumps(to_wire(value)))) == value


def test_names_and_values_on_the_wire() -> None:
    attempt = AttemptStatus(number=2, started_at=1_769_860_800.9, exit_code=0, message="")
    assert to_wire(attempt) == {
        "number": 2,
        "nodes": 0,
        "startedAt": "2026-01-31T12:00:00Z",
        "exitCode": 0,
        "message": "",
    }


def test_what_is_none_or_an_empty_list_is_left_out_and_an_empty_object_is_not() -> None:
    scratch = Volume(name="scratch", empty_dir=EmptyDirVolume())
    assert to_wire(PodTemplate(volumes=(scratch,))) == {
        "resources": {},
        "volumes": [{"name": "scratch", "emptyDir": {"medium": ""}}],
    }
    # An empty selector takes all namespaces, none takes the pod's own.
    assert to_wire(PodAffinityTerm(topology_key="zone", namespace_selector=LabelSelector())) == {
        "namespaceSelector": {},
        "topologyKey": "zone",
    }


def test_what_is_missing_or_null_has_its_default() -> None:
    spec = from_wire(TrainingRunSpec, {**LEAST, "nodes": None, "checkpoint": None, "elastic": None})
    assert spec == TrainingRunSpec(run_uri="s3://bucket/run", config=ConfigSource(inline="a: 1"))
    assert (spec.nodes, spec.procs_per_node, spec.checkpoint.every_steps) == (1, "auto", None)


def test_unknown_keys_are_ignored() -> None:
    later = {**LEAST, "fieldOfALaterVersion": 1, "checkpoint": {"other": {}}}
    assert from_wire(TrainingRunSpec, later) == from_wire(TrainingRunSpec, LEAST)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"nodes": 3.0}, 3),
        ({"procsPerNode": 8.0}, 8),
        ({"watchdog": {"stepTimeoutFactor": 8}}, 8.0),
        ({"data": {"cache": {"path": "/a", "sizeLimit": 1024}}}, "1024"),
        ({"data": {"cache": {"path": "/a", "sizeLimit": "1Gi"}}}, "1Gi"),
    ],
)
def test_numbers_have_the_type_of_the_field_however_they_are_written(given: dict[str, Any], expected: Any) -> None:
    spec = from_wire(TrainingRunSpec, {**LEAST, **given})
    cache = spec.data.cache
    read = {
        "nodes": spec.nodes,
        "procsPerNode": spec.procs_per_node,
        "watchdog": spec.watchdog.step_timeout_factor,
        "data": None if cache is None else cache.size_limit,
    }[next(iter(given))]
    assert (read, type(read)) == (expected, type(expected))


@pytest.mark.parametrize("text", ["2026-01-31T12:00:00Z", "2026-01-31T13:00:00+01:00", "2026-01-31T12:00:00.000Z"])
def test_times_are_read_as_seconds_since_1970(text: str) -> None:
    value = {"type": "Running", "status": "True", "reason": "A", "lastTransitionTime": text}
    assert from_wire(Condition, value).last_transition_time == 1_769_860_800.0


@pytest.mark.parametrize(
    ("cls", "value", "message"),
    [
        (TrainingRunSpec, {"config": {"inline": "a"}}, "spec.runUri: missing"),
        (TrainingRunSpec, "text", "spec: expected an object, found 'text'"),
        (TrainingRunSpec, None, "spec: expected an object, found nothing"),
        (TrainingRunSpec, {**LEAST, "nodes": "2"}, "spec.nodes: expected a whole number, found '2'"),
        (TrainingRunSpec, {**LEAST, "nodes": True}, "spec.nodes: expected a whole number, found True"),
        (TrainingRunSpec, {**LEAST, "nodes": 1.5}, "spec.nodes: expected a whole number, found 1.5"),
        (TrainingRunSpec, {**LEAST, "suspend": 1}, "spec.suspend: expected true or false, found 1"),
        (TrainingRunSpec, {**LEAST, "runUri": ["a"]}, "spec.runUri: expected text, found a list"),
        (
            TrainingRunSpec,
            {**LEAST, "elastic": {"allowedNodes": 3}},
            "spec.elastic.allowedNodes: expected a list, found 3",
        ),
        (
            TrainingRunSpec,
            {**LEAST, "elastic": {"allowedNodes": [4, {}]}},
            "spec.elastic.allowedNodes[1]: expected a whole number, found an object",
        ),
        (
            TrainingRunSpec,
            {**LEAST, "podTemplate": {"env": [{"name": "A"}, {}]}},
            "spec.podTemplate.env[1].name: missing",
        ),
        (
            TrainingRunSpec,
            {**LEAST, "podTemplate": {"labels": {"a": 1}}},
            "spec.podTemplate.labels[a]: expected text, found 1",
        ),
        (
            TrainingRunSpec,
            {**LEAST, "podTemplate": {"labels": []}},
            "spec.podTemplate.labels: expected an object, found a list",
        ),
        (
            TrainingRunSpec,
            {**LEAST, "entrypoint": "sh"},
            "spec.entrypoint: expected 'train' or 'train_vae', found 'sh'",
        ),
        (
            TrainingRunSpec,
            {**LEAST, "procsPerNode": "all"},
            "spec.procsPerNode: expected a whole number or 'auto', found 'all'",
        ),
        (
            TrainingRunSpec,
            {**LEAST, "watchdog": {"stepTimeoutFactor": float("nan")}},
            "spec.watchdog.stepTimeoutFactor: expected a number, found nan",
        ),
        (
            TrainingRunStatus,
            {"startedAt": "yesterday"},
            "spec.startedAt: expected a time such as 2026-01-31T12:00:00Z, found 'yesterday'",
        ),
        (SampleJobSpec, {"checkpoint": {}, "prompts": {}}, "spec.outputUri: missing"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_place(cls: type, value: Any, message: str) -> None:
    with pytest.raises(WireError) as caught:
        from_wire(cls, value, path="spec")
    assert str(caught.value) == message


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(WireError) as caught:
        from_wire(TrainingRunSpec, {**LEAST, "nodes": "x" * 10_000})
    assert len(str(caught.value)) < 200
