"""Everything that can be told of a manifest without a cluster: schema, rules, world size, and the config itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opensora_operator.kinds import KINDS
from opensora_operator.reasons import Reason

from osctl.client import Object
from osctl.forecast import Files, Forecast, forecast
from osctl.layout import layout_of
from osctl.resolved import config_of, why_unknown
from osctl.validation import Problem, schema_of, validate, with_defaults

_IMAGE = "example.com/opensora:latest"
"""Stands in where only the cluster's profile knows the image; it shows nowhere."""
_NEEDS_CLUSTER = (Reason.CONFIG_MISSING, Reason.PROFILE_NOT_FOUND, Reason.RUN_NOT_FOUND)


@dataclass(frozen=True)
class Report:
    """What is wrong with an object, and what could not be told."""

    problems: tuple[Problem, ...]
    unknown: tuple[str, ...]
    planned: Forecast | None = None
    """What the operator makes of a TrainingRun whose config could be read."""


def check(body: Object, *, others: Sequence[Object] = ()) -> Report:
    """Check an object of our kinds.

    Args:
        body: as it stands in a file.
        others: the objects beside it, which it may refer to.
    """
    problems = validate(body)
    if problems or body["kind"] not in KINDS:
        return Report(tuple(problems), ())
    complete = {**body, "spec": with_defaults(body["spec"], schema_of(body["kind"])["properties"]["spec"])}
    complete["spec"].setdefault("image", _IMAGE)
    namespace = str(body["metadata"].get("namespace") or "default")
    planned = forecast(complete, Files(others), namespace=namespace)
    if planned.problem is not None:
        if planned.reason is None:  # it waits for something, which is no mistake
            return Report((), ())
        if planned.reason in _NEEDS_CLUSTER:
            return Report((), (f"{planned.problem} here; the rest cannot be checked without it",))
        return Report((Problem("", planned.problem),), ())
    if body["kind"] != "TrainingRun":
        return Report((), ())
    return _check_config(planned)


def _check_config(planned: Forecast) -> Report:
    """The config as the pods read it."""
    from opensora.errors import ConfigError  # slow to import

    unknown = why_unknown(planned)
    try:
        config = config_of(planned)
    except ConfigError as error:
        return Report((Problem("spec.config", error.message),), ())
    if config is None:
        return Report((), (str(unknown),))
    ranks, groups = layout_of(planned).ranks, config.parallel.replicas
    if ranks % groups:
        message = f"{ranks} ranks do not divide into parallel.replicas={groups} groups"
        return Report((Problem("spec.config", message),), ())
    return Report((), (), planned)
