"""The generated definitions: they are those in the repository, everything in them is bounded, and they fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from opensora_operator.api import KINDS, Kind
from opensora_operator.crd import COLUMNS, ROOT, SCHEMA_HASH, crd, files
from opensora_operator.wire import from_wire, to_wire

from opensora.config.load import parse_train_config

SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
FILES = files()
_IDS = [kind.name for kind in KINDS]


def _schema(kind: Kind) -> dict[str, Any]:
    schema: dict[str, Any] = crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def _nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within a schema, with its path; not those of metadata, which Kubernetes knows."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        if f"{path}.{name}" != ".metadata":
            yield from _nodes(inner, f"{path}.{name}")
    for key, suffix in (("items", "[]"), ("additionalProperties", "{}")):
        if key in schema:
            yield from _nodes(schema[key], path + suffix)


# ------------------------------------------------------------------------------------------------- generated files


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_repository_has_what_the_generator_writes(path: Path) -> None:
    written = (ROOT / path).read_text(encoding="utf-8")
    assert written == FILES[path], "run `python -m opensora_operator.crd`"


@pytest.mark.parametrize("folder", ["manifests/crds", "charts/opensora-operator/templates/crds"])
def test_nothing_else_lies_beside_the_generated_files(folder: str) -> None:
    there = {path.relative_to(ROOT) for path in (ROOT / folder).iterdir()}
    assert there == {path for path in FILES if path.parent == Path(folder)}


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_the_chart_has_the_same_definition_between_its_switches(kind: Kind) -> None:
    lines = FILES[Path(f"charts/opensora-operator/templates/crds/{kind.plural}.yaml")].splitlines()
    switches = [line.strip() for line in lines if "{{" in line]
    assert switches == ["{{- if .Values.crds.install }}", "{{- if .Values.crds.keep }}", "{{- end }}", "{{- end }}"]
    rendered = [line for line in lines if "{{" not in line]
    rendered.remove("    helm.sh/resource-policy: keep")
    assert rendered == FILES[Path(f"manifests/crds/{kind.plural}.yaml")].splitlines()


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_the_yaml_means_what_was_generated(kind: Kind) -> None:
    assert yaml.safe_load(FILES[Path(f"manifests/crds/{kind.plural}.yaml")]) == crd(kind)


def test_the_hash_tells_schemas_apart() -> None:
    assert len({crd(kind)["metadata"]["annotations"][SCHEMA_HASH] for kind in KINDS}) == len(KINDS)


# ---------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_everything_is_bounded(kind: Kind) -> None:
    unbounded = []
    for path, node in _nodes(_schema(kind)):
        is_bounded = (
            (node.get("type") == "object" and ("properties" in node or "maxProperties" in node))
            or (node.get("type") == "array" and "maxItems" in node)
            or (node.get("type") in ("integer", "number") and {"minimum", "maximum"} <= node.keys())
            or (node.get("type") == "string" and ("maxLength" in node or "enum" in node))
            or (node.get("x-kubernetes-int-or-string") and {"maxLength", "minimum"} <= node.keys())
            or node.get("type") == "boolean"
            or path in (".apiVersion", ".kind")
        )
        if not is_bounded:
            unbounded.append(path)
    assert not unbounded


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_every_property_is_described(kind: Kind) -> None:
    described = [
        (path, node.get("description"))
        for path, node in _nodes(_schema(kind))
        if not path.endswith(("[]", "{}")) and path
    ]
    assert not [path for path, text in described if not text]


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_nothing_is_accepted_unseen(kind: Kind) -> None:
    assert not [path for path, node in _nodes(_schema(kind)) if node.get("x-kubernetes-preserve-unknown-fields")]
    assert crd(kind)["spec"].get("preserveUnknownFields", False) is False


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_kubectl_apply_can_carry_the_definition(kind: Kind) -> None:
    # It writes the whole object into an annotation, of which all together may have 256 KiB.
    assert len(json.dumps(crd(kind)).encode()) < 200 * 1024


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_no_property_has_a_name_that_yaml_reads_as_something_else(kind: Kind) -> None:
    names = {path.split(".")[-1].strip("[]{}").lower() for path, _ in _nodes(_schema(kind))}
    assert not names & {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"}


# ----------------------------------------------------------------------------------------------------------- names


def test_short_names_and_scopes() -> None:
    names = {kind.name: crd(kind)["spec"] for kind in KINDS}
    assert {name: spec["names"]["shortNames"] for name, spec in names.items()} == {
        "TrainingRun": ["tr"],
        "SampleJob": ["sj"],
        "BatchSearch": ["bs"],
        "TrainingProfile": ["tp"],
        "ClusterTrainingProfile": ["ctp"],
    }
    assert [name for name, spec in names.items() if spec["scope"] == "Cluster"] == ["ClusterTrainingProfile"]
    assert all(spec["names"]["categories"] == ["os"] for spec in names.values())
    with_status = [name for name, spec in names.items() if "status" in spec["versions"][0].get("subresources", {})]
    assert with_status == ["TrainingRun", "SampleJob", "BatchSearch"]


@pytest.mark.parametrize("kind", KINDS, ids=_IDS)
def test_columns_show_fields_that_exist(kind: Kind) -> None:
    paths = {path for path, _ in _nodes(_schema(kind))} | {".metadata.creationTimestamp"}
    assert {column.path for column in COLUMNS[kind]} <= paths


def test_the_reference_page_names_every_field() -> None:
    page = FILES[Path("docs/reference/api.md")]
    for kind in KINDS:
        for path, node in _nodes(_schema(kind)):
            name = path.split(".")[-1]
            if path.count(".") > 1 and not name.endswith(("[]", "{}")):
                row = f"| `{name}` |"
                assert row in page, path
                assert node["description"].replace("|", "\\|") in page, path


# --------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_sample_has_no_field_that_is_not_read(path: Path) -> None:
    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind = next(kind for kind in KINDS if kind.name == body["kind"])
    _check_covers(to_wire(from_wire(kind.spec, body["spec"])), body["spec"])


def _check_covers(read: Any, given: Any) -> None:
    if isinstance(given, dict):
        for key, value in given.items():
            _check_covers(read[key], value)
    elif isinstance(given, list):
        for pair in zip(read, given, strict=True):
            _check_covers(*pair)
    else:
        assert read == given


@pytest.mark.parametrize("name", ["trainingrun", "batchsearch"])
def test_the_config_in_a_sample_is_one_that_the_core_takes(name: str) -> None:
    body = yaml.safe_load((ROOT / "manifests" / "samples" / f"{name}.yaml").read_text(encoding="utf-8"))
    config = parse_train_config(body["spec"]["config"]["inline"], source=name, overrides=["run_uri=/tmp/run"])
    assert config.train.steps == 200
    for bucket in body["spec"].get("buckets", []):
        assert bucket["frames"] in config.data.bucket_config[bucket["resolution"]]
