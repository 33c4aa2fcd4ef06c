"""`osctl version`."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from osctl.errors import ApiError
from osctl.options import Format, OutputFormat
from osctl.output import as_json, as_yaml
from osctl.session import Session


def version(
    session: Session,
    server: Annotated[bool, typer.Option("--server", help="Ask the cluster for its versions as well.")] = False,
    output: OutputFormat = None,
) -> None:
    """Show the version of osctl and of the cluster.

    With `--server` it also tells whether the cluster has the definitions that this osctl knows.
    """
    found = {"osctl": importlib.metadata.version("opensora")}
    if server:
        found["kubernetes"] = str(session.client.request("GET", "/version").get("gitVersion"))
        found["definitions"] = _definitions(session)
    if output in (Format.JSON, Format.YAML):
        session.output.data(as_json(found) if output is Format.JSON else as_yaml(found))
        return
    for name, value in found.items():
        session.output.data(f"{name} {value}")


def _definitions(session: Session) -> str:
    from opensora_operator.api import TRAINING_RUN  # slow to import
    from opensora_operator.crd import SCHEMA_HASH, crd

    from osctl.client import Resource

    resource = Resource("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", False)
    try:
        installed = session.client.find(resource, None, TRAINING_RUN.crd_name)
    except ApiError as error:
        if error.status == 403:
            return "unknown: you may not read them"
        raise
    if installed is None:
        return "not installed"
    theirs = (installed["metadata"].get("annotations") or {}).get(SCHEMA_HASH, "without a hash")
    ours = crd(TRAINING_RUN)["metadata"]["annotations"][SCHEMA_HASH]
    return f"{theirs}, the same" if theirs == ours else f"{theirs}, other than osctl's {ours}"
