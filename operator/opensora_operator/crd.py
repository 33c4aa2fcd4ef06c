"""Writes the CustomResourceDefinitions and the reference page of the API: `python -m opensora_operator.crd`.

The chart's copies are the same objects with two switches of its values around them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opensora_operator.api import (
    BATCH_SEARCH,
    CLUSTER_TRAINING_PROFILE,
    KINDS,
    NAME_RULE,
    SAMPLE_JOB,
    TRAINING_PROFILE,
    TRAINING_RUN,
    Kind,
)
from opensora_operator.api_page import api_page
from opensora_operator.constants import GROUP, VERSION
from opensora_operator.schema import Schema, add_rules, object_schema

ROOT = Path(__file__).parents[2]
SCHEMA_HASH = f"{GROUP}/schema-hash"
"""Annotation of a CRD: by it, tools see whether a cluster has the schema that they know."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of `kubectl get`."""

    name: str
    path: str
    type: str = "string"
    wide: bool = False
    """Only with `-o wide`."""


_AGE = Column(name="Age", path=".metadata.creationTimestamp", type="date")
COLUMNS: dict[Kind, tuple[Column, ...]] = {
    TRAINING_RUN: (
        Column(name="Phase", path=".status.phase"),
        Column(name="Nodes", path=".status.nodes.summary"),
        Column(name="Step", path=".status.progress.step", type="integer"),
        Column(name="%", path=".status.progress.percent", type="integer"),
        Column(name="ETA", path=".status.progress.eta"),
        Column(name="Attempt", path=".status.attempt", type="integer"),
        Column(name="Restarts", path=".status.restarts", type="integer"),
        _AGE,
        Column(name="Queue", path=".status.resolved.queue", wide=True),
        Column(name="Loss", path=".status.progress.loss", wide=True),
        Column(name="S/Step", path=".status.progress.secondsPerStep", wide=True),
        Column(name="Job", path=".status.job", wide=True),
    ),
    SAMPLE_JOB: (
        Column(name="Phase", path=".status.phase"),
        Column(name="Shards", path=".status.shards.summary"),
        Column(name="Failed", path=".status.shards.failed", type="integer"),
        Column(name="Step", path=".status.checkpoint.step", type="integer"),
        _AGE,
        Column(name="Sheet", path=".status.sheet", wide=True),
        Column(name="Queue", path=".status.resolved.queue", wide=True),
        Column(name="Job", path=".status.job", wide=True),
    ),
    BATCH_SEARCH: (
        Column(name="Phase", path=".status.phase"),
        Column(name="Buckets", path=".status.buckets.summary"),
        Column(name="Failed", path=".status.buckets.failed", type="integer"),
        Column(name="Table", path=".status.table"),
        _AGE,
        Column(name="Objective", path=".spec.objective", wide=True),
        Column(name="Reused", path=".status.reused", type="boolean", wide=True),
    ),
    **{
        kind: (
            Column(name="Default", path=".spec.default", type="boolean"),
            Column(name="Accelerator", path=".spec.accelerator.name"),
            Column(name="Count", path=".spec.accelerator.count", type="integer"),
            _AGE,
            Column(name="Image", path=".spec.image", wide=True),
            Column(name="Description", path=".spec.description", wide=True),
        )
        for kind in (TRAINING_PROFILE, CLUSTER_TRAINING_PROFILE)
    },
}


def crd(kind: Kind) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind."""
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _root_schema(kind)},
        "additionalPrinterColumns": [_column(column) for column in COLUMNS[kind]],
    }
    if kind.status is not None:
        version["subresources"] = {"status": {}}
    spec = {
        "group": GROUP,
        "names": {
            "kind": kind.name,
            "listKind": f"{kind.name}List",
            "plural": kind.plural,
            "singular": kind.singular,
            "shortNames": list(kind.short_names),
            "categories": ["os"],
        },
        "scope": "Namespaced" if kind.namespaced else "Cluster",
        "versions": [version],
    }
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": kind.crd_name, "annotations": {SCHEMA_HASH: digest}},
        "spec": spec,
    }


def files() -> dict[Path, str]:
    """Every generated file, by its path in the repository, with its content."""
    written: dict[Path, str] = {Path("docs/reference/api.md"): api_page()}
    for kind in KINDS:
        document = _yaml(crd(kind))
        written[Path("manifests/crds") / f"{kind.plural}.yaml"] = _HEADER + document
        written[Path("charts/opensora-operator/templates/crds") / f"{kind.plural}.yaml"] = _in_chart(document)
    return written


def main() -> None:
    """Write all generated files."""
    for path, content in files().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(content, encoding="utf-8")


def _root_schema(kind: Kind) -> Schema:
    properties: Schema = {
        "apiVersion": {"type": "string", "description": f"`{GROUP}/{VERSION}`."},
        "kind": {"type": "string", "description": f"`{kind.name}`."},
        "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
        "spec": {"description": (kind.spec.__doc__ or "").strip(), **object_schema(kind.spec)},
    }
    root: Schema = {"type": "object", "description": kind.doc, "required": ["spec"], "properties": properties}
    if kind.status is not None:
        description = (kind.status.__doc__ or "").strip()
        properties["status"] = {"description": description, **object_schema(kind.status, with_defaults=False)}
        add_rules(root, [NAME_RULE])
    return root


def _column(column: Column) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": column.name, "type": column.type, "jsonPath": column.path}
    if column.wide:
        entry["priority"] = 1
    return entry


_HEADER = "# Written by `python -m opensora_operator.crd` from operator/opensora_operator/api.py; edit that instead.\n"


def _in_chart(document: str) -> str:
    """The same with the chart's switches: not installed at all, or kept when the release is removed."""
    assert "{{" not in document
    annotation = f"    {SCHEMA_HASH}:"
    before, after = document.split(annotation, 1)
    keep = "    {{- if .Values.crds.keep }}\n    helm.sh/resource-policy: keep\n    {{- end }}\n"
    return f"{_HEADER}{{{{- if .Values.crds.install }}}}\n{before}{keep}{annotation}{after}{{{{- end }}}}\n"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


if __name__ == "__main__":
    main()
