"""The API's classes: everything is described, and what others also know agrees with them."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import pytest
from opensora_operator.api import KINDS, TrainingRunSpec, TrainingRunStatus
from opensora_operator.constants import RESERVED_ENV, RESERVED_ENV_PREFIX
from opensora_operator.fields import camel_case, docs_of, fields_of, split, unwrap_optional

from opensora import records
from opensora.launch import LaunchConfig


def _classes() -> list[type]:
    """Every class that specs and status are made of."""
    found: list[type] = []
    waiting: list[Any] = [cls for kind in KINDS for cls in (kind.spec, kind.status) if cls is not None]
    while waiting:
        hint = waiting.pop()
        if typing.get_origin(hint) in (tuple, dict):
            waiting.append(split(typing.get_args(hint)[0 if typing.get_origin(hint) is tuple else 1])[0])
        elif dataclasses.is_dataclass(hint) and hint not in found:
            assert isinstance(hint, type)
            found.append(hint)
            waiting += [unwrap_optional(info.hint, info.markers)[0] for info in fields_of(hint)]
    return found


def test_every_class_and_field_is_described_in_whole_sentences() -> None:
    poor = []
    for cls in _classes():
        assert docs_of(cls).keys() == {info.name for info in fields_of(cls)}
        texts = {"": cls.__doc__ or "", **docs_of(cls)}
        poor += [f"{cls.__name__}.{name}" for name, text in texts.items() if not re.match(r"[A-Z`].*[.…]$", text, re.S)]
    assert not poor


def test_objects_cannot_be_changed_and_are_made_by_the_names_of_fields() -> None:
    for cls in _classes():
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert all(field.kw_only for field in dataclasses.fields(cls))


def test_names_of_kinds_are_not_taken_twice() -> None:
    names = [name for kind in KINDS for name in (kind.singular, kind.plural, *kind.short_names)]
    assert len(names) == len(set(names))


def test_the_reserved_variables_are_those_of_ranks_and_launcher() -> None:
    ranks = {
        records.RANK,
        records.LOCAL_RANK,
        records.WORLD_SIZE,
        records.LOCAL_WORLD_SIZE,
        records.MASTER_ADDR,
        records.MASTER_PORT,
    }
    assert set(RESERVED_ENV) == {*ranks, "JOB_COMPLETION_INDEX"}
    settings = [f"OPENSORA_{field.name.upper()}" for field in dataclasses.fields(LaunchConfig)]
    for name in (records.ATTEMPT, records.RUN_URI, records.END_RECORD, *settings):
        assert name.startswith(RESERVED_ENV_PREFIX)


def test_attempts_of_the_status_hold_ten() -> None:
    (attempts,) = (info for info in fields_of(TrainingRunStatus) if info.name == "attempts")
    assert [marker.le for marker in attempts.markers if type(marker).__name__ == "MaxItems"] == [10]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("suspend", "suspend"), ("run_uri", "runUri"), ("ttl_seconds_after_finished", "ttlSecondsAfterFinished")],
)
def test_names_on_the_wire_are_in_camel_case(name: str, expected: str) -> None:
    assert camel_case(name) == expected


def test_a_spec_in_python_needs_no_more_than_one_in_yaml() -> None:
    required = {info.wire_name for info in fields_of(TrainingRunSpec) if info.is_required}
    assert required == {"runUri", "config"}
