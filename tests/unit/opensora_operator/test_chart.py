"""The chart's files fit together. What it renders is tested in tests/control_plane/test_chart.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from opensora_operator.metrics import METRICS, Metric

CHART = Path(__file__).parents[3] / "charts/opensora-operator"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
TEMPLATES = "\n".join(path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").rglob("*.*")))


def keys_of(values: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key with a dot between levels, and whether the schema knows it; no deeper than the schema goes."""
    for name, value in values.items():
        entry = schema.get("properties", {}).get(name)
        yield f"{prefix}{name}", entry is not None
        if entry is not None and "properties" in entry:
            yield from keys_of(value, entry, f"{prefix}{name}.")


def known_to(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, entry in schema.get("properties", {}).items():
        yield f"{prefix}{name}"
        yield from known_to(entry, f"{prefix}{name}.")


def test_schema_and_values_have_the_same_keys() -> None:
    assert [key for key, is_known in keys_of(VALUES, SCHEMA) if not is_known] == []
    assert set(known_to(SCHEMA)) - {key for key, _ in keys_of(VALUES, SCHEMA)} == {"global"}


def test_every_level_of_the_schema_refuses_unknown_keys() -> None:
    def open_levels(schema: dict[str, Any], path: str) -> Iterator[str]:
        if "properties" in schema:
            if schema.get("additionalProperties") is not False:
                yield path
            for name, entry in schema["properties"].items():
                yield from open_levels(entry, f"{path}.{name}")

    assert list(open_levels(SCHEMA, "")) == []


def test_the_chart_has_the_version_of_the_package() -> None:
    project = (CHART.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert version is not None
    assert chart["version"] == chart["appVersion"] == version[1]


def test_every_named_template_is_used() -> None:
    defined = set(re.findall(r'define "([^"]+)"', TEMPLATES))
    assert defined == set(re.findall(r'include "([^"]+)"', TEMPLATES))


# ------------------------------------------------------------------------------------------------------- dashboard


DASHBOARD = json.loads((CHART / "dashboards/opensora.json").read_text(encoding="utf-8"))


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def series_of(metric: Metric) -> str:
    """The name that is asked for: quantiles of a histogram come from its buckets."""
    return f"{metric.name}_bucket" if metric.buckets else metric.name


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    asked = {name for text in expressions() for name in re.findall(r"opensora_\w+", text)}
    assert asked == {series_of(metric) for metric in METRICS.values()}


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboard_groups_by_labels_that_exist(expression: str) -> None:
    (metric,) = (found for found in METRICS.values() if re.search(rf"\b{series_of(found)}\{{", expression))
    used = {name.strip() for names in re.findall(r"by \(([^)]*)\)", expression) for name in names.split(",")}
    used |= set(re.findall(r"[{,](\w+)=", expression))
    assert used <= {*metric.labels, "le", "job"}


def test_panels_do_not_lie_on_top_of_each_other() -> None:
    taken = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
