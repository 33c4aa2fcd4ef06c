"""Files that people write: manifests as `kubectl apply` takes them, and configs from which a run is made."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_operator.api import KINDS, MAX_NAME
from opensora_operator.constants import API_VERSION, GROUP

from osctl.client import CONFIG_MAPS, Object, Resource
from osctl.errors import UsageError
from osctl.kinds import resource_of

RUN = "TrainingRun"
_CONFIG_SUFFIXES = (".py", ".yaml", ".yml", ".json")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What flags say about a run, over its file. None leaves what the file has."""

    name: str | None = None
    nodes: int | None = None
    procs_per_node: str | None = None
    image: str | None = None
    run_uri: str | None = None
    data: str | None = None
    overrides: tuple[str, ...] = ()
    queue: str | None = None
    profile: str | None = None
    suspend: bool = False


def read_text(path: str) -> str:
    """The text of a file, or of stdin for `-`. Raises UsageError."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name that no file can have
        words = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be read: {words}", hint="give a run file, a config, or - for stdin") from error


def read_documents(path: str) -> list[Any]:
    """The documents of a YAML or JSON file. Raises UsageError."""
    import yaml  # slow to import

    try:
        found = [document for document in yaml.safe_load_all(read_text(path)) if document is not None]
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f"{path}, line {where.line + 1}" if where is not None else path
        raise UsageError(f"{place}: {getattr(error, 'problem', None) or error}", hint="correct the YAML") from error
    except (ValueError, RecursionError) as error:  # a date that is none, or brackets without end
        raise UsageError(f"{path}: {error}", hint="correct the YAML") from error
    if not found:
        raise UsageError(f"{path} is empty", hint="give a run file or a config")
    return found


def is_config(path: str) -> bool:
    """Whether a file is a config of the core, and not a manifest. Raises UsageError."""
    if path.endswith(".py"):
        return True
    documents = read_documents(path) if path.endswith(_CONFIG_SUFFIXES) else []
    return len(documents) == 1 and isinstance(documents[0], dict) and not {"apiVersion", "kind"} & set(documents[0])


def read_manifests(path: str) -> list[Object]:
    """The objects of a manifest: of our kinds, and ConfigMaps that they read. Raises UsageError."""
    found = []
    for document in read_documents(path):
        is_list = isinstance(document, dict) and document.get("kind") == "List"
        items = (document.get("items") or []) if is_list else [document]
        if not isinstance(items, list):
            raise UsageError(f"{path}: items of a List is no list", hint="correct the file")
        for item in items:
            resource_of_object(item, source=path)
            found.append(item)
    return found


def resource_of_object(body: Any, *, source: str) -> Resource:
    """What an object is to the API server. Raises UsageError for what is none of ours."""
    if not isinstance(body, dict) or not isinstance(body.get("metadata"), dict) or "kind" not in body:
        raise UsageError(
            f"{source}: a document has no kind and no metadata", hint="`kubectl apply` would not take it either"
        )
    version, kind = body.get("apiVersion"), body["kind"]
    if not isinstance(body["metadata"].get("name"), str):
        raise UsageError(f"{source}: {kind} has no metadata.name", hint="give it a name")
    if version == CONFIG_MAPS.api_version and kind == CONFIG_MAPS.kind:
        return CONFIG_MAPS
    if isinstance(version, str) and version.partition("/")[0] == GROUP:
        if version != API_VERSION:
            raise UsageError(f"{source}: {kind} is of {version}", hint=f"this osctl knows {API_VERSION}")
        known = next((known for known in KINDS if known.name == kind), None)
        if known is not None:
            return resource_of(known)
    raise UsageError(
        f"{source}: {version} {kind} is none of ours",
        hint=f"kinds are {', '.join(known.name for known in KINDS)} and ConfigMap; `kubectl apply` takes others",
    )


def with_choices(body: Object, choices: Choices) -> Object:
    """A run with what flags say."""
    spec = dict(body.get("spec") or {})
    metadata = dict(body["metadata"])
    if choices.name is not None:
        metadata["name"] = choices.name
    for key, value in (("nodes", choices.nodes), ("image", choices.image), ("runUri", choices.run_uri)):
        if value is not None:
            spec[key] = value
    if choices.procs_per_node is not None:
        spec["procsPerNode"] = _procs(choices.procs_per_node)
    if choices.data is not None:
        spec["data"] = {**(spec.get("data") or {}), "catalogue": choices.data}
    if choices.overrides:
        config = spec.get("config") or {}
        spec["config"] = {**config, "overrides": [*(config.get("overrides") or ()), *choices.overrides]}
    if choices.queue is not None:
        spec["scheduling"] = {**(spec.get("scheduling") or {}), "queue": choices.queue}
    if choices.profile is not None:
        spec["profileRef"] = {"name": choices.profile}
    if choices.suspend:
        spec["suspend"] = True
    return {**body, "metadata": metadata, "spec": spec}


def run_from_config(path: str, choices: Choices) -> Object:
    """A run that trains what a config says: the config goes into it whole, with what it inherits and flags change.

    Raises:
        ConfigError: the config is wrong.
        UsageError: no name can be made of the file's.
    """
    from opensora.config.load import dump_config, load_train_config  # slow to import

    name = choices.name or name_of(path)
    given = [*choices.overrides]
    if choices.run_uri is not None:
        given.append(f"run_uri={choices.run_uri.replace('{name}', name)}")
    if choices.data is not None:
        given.append(f"data.path={choices.data}")
    config = load_train_config(path, given)
    body: Object = {
        "apiVersion": API_VERSION,
        "kind": RUN,
        "metadata": {"name": name},
        "spec": {"runUri": config.run_uri, "config": {"inline": dump_config(config)}},
    }
    from_flags = Choices(
        nodes=choices.nodes,
        procs_per_node=choices.procs_per_node,
        image=choices.image,
        queue=choices.queue,
        profile=choices.profile,
        suspend=choices.suspend,
    )
    return with_choices(body, from_flags)


def name_of(path: str) -> str:
    """A name for the run of a config file. Raises UsageError."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(path).stem.lower()).strip("-")[:MAX_NAME].rstrip("-")
    name = name if not name[:1].isdigit() else f"run-{name}"[:MAX_NAME].rstrip("-")
    if not name:
        raise UsageError(f"no name can be made of {path}", hint="give one with --name")
    return name


def runs_of(objects: Sequence[Object], *, source: str) -> list[Object]:
    """The TrainingRuns among objects. Raises UsageError where there is none."""
    runs = [body for body in objects if body["kind"] == RUN]
    if not runs:
        kinds = ", ".join(sorted({str(body["kind"]) for body in objects}))
        raise UsageError(f"{source} has no TrainingRun, only {kinds}", hint="`kubectl apply` creates other objects")
    return runs


def _procs(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isdigit():
        return int(text)
    raise UsageError(f"--procs-per-node is {text!r}", hint="give a number, or auto")
