"""Settings of the operator: each is a flag and an environment variable; the flag wins."""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opensora_operator.fields import docs_of

PREFIX = "OPENSORA_OPERATOR_"
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class SettingsError(Exception):
    """A setting has a value that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings."""

    kubeconfig: str = ""
    """How to reach the API server; empty: the pod's service account, or ~/.kube/config outside a pod."""
    namespaces: tuple[str, ...] = ()
    """The namespaces to look after, separated by commas; empty means all."""
    own_namespace: str = ""
    """Where the Lease lives; empty: the namespace of the pod, or "default" outside one."""
    identity: str = ""
    """The name of this replica; empty: the name of the pod."""
    leader_election: bool = True
    """Whether to wait for the Lease; "false" only where nothing else can run."""
    lease_name: str = "opensora-operator"
    """The name of the Lease: operators with the same name take turns."""
    lease_seconds: float = 15.0
    """How long a leader that has fallen silent keeps the Lease."""
    renew_seconds: float = 10.0
    """How long a leader tries to renew the Lease before it ends."""
    retry_seconds: float = 2.0
    """How often the Lease is renewed, or looked at by those who wait for it."""
    concurrency: int = 8
    """How many objects are worked on at the same time."""
    resync_seconds: float = 300.0
    """How often every object is looked at although nothing happened, and compared with the API server."""
    requests_per_second: float = 400.0
    """How many requests may be sent to the API server, in the long run."""
    requests_burst: int = 800
    """How many requests may be sent at once."""
    progress_writes_per_second: float = 5.0
    """How many statuses may be written only because steps advance, for all objects together."""
    progress_service: str = ""
    """The Service in the operator's namespace by which runs reach it with their progress; empty takes no progress."""
    progress_port: int = 9443
    """The port of that Service and of the server behind it."""
    http_address: str = "0.0.0.0"
    """Where /metrics, /healthz and progress are served."""
    http_port: int = 8080
    """Their port; 0 takes a free one and logs it."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged."""
    log_format: Literal["json", "text"] = "json"
    """How it is logged: one JSON object a line, or text for people."""

    def __post_init__(self) -> None:
        for name in ("lease_seconds", "renew_seconds", "retry_seconds", "resync_seconds", "requests_per_second"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; it has to be above 0")
        for name in ("concurrency", "requests_burst"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it has to be at least 1")
        if self.progress_writes_per_second <= 0:
            raise SettingsError(
                f"progress_writes_per_second is {self.progress_writes_per_second}; it has to be above 0"
            )
        if not self.retry_seconds < self.renew_seconds < self.lease_seconds:
            raise SettingsError(
                f"retry_seconds {self.retry_seconds} < renew_seconds {self.renew_seconds} < "
                f"lease_seconds {self.lease_seconds} has to hold: else two replicas may lead at the same time"
            )


def read_settings(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a command line and an environment. Ends the process when asked for help; SettingsError."""
    hints = typing.get_type_hints(Settings)
    docs = docs_of(Settings)
    parser = argparse.ArgumentParser(prog="opensora-operator", description="Runs TrainingRuns on Kubernetes.")
    for field in dataclasses.fields(Settings):
        help_text = f"{docs[field.name]} [${PREFIX}{field.name.upper()}, default: {_text(field.default)}]"
        parser.add_argument(_flag(field.name), metavar="VALUE", help=help_text.replace("%", "%%"))
    given = {name: text for name, text in vars(parser.parse_args(arguments)).items() if text is not None}
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        text = given.get(name, environment.get(PREFIX + name.upper()))
        if text is not None:
            source = _flag(name) if name in given else PREFIX + name.upper()
            values[name] = _parse(hint, text, source)
    unknown = sorted(
        name for name in environment if name.startswith(PREFIX) and name[len(PREFIX) :].lower() not in hints
    )
    if unknown:
        raise SettingsError(f"{', '.join(unknown)}: no such setting; see opensora-operator --help")
    return _fill_in(Settings(**values), environment)


def _fill_in(settings: Settings, environment: Mapping[str, str]) -> Settings:
    """What is empty and follows from where the process runs."""
    namespace = settings.own_namespace or environment.get("POD_NAMESPACE", "")
    if not namespace and _NAMESPACE_FILE.exists():
        namespace = _NAMESPACE_FILE.read_text().strip()
    identity = settings.identity or environment.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}"
    return dataclasses.replace(settings, own_namespace=namespace or "default", identity=identity)


def _parse(hint: Any, text: str, source: str) -> Any:
    if typing.get_origin(hint) is Literal:
        if text not in typing.get_args(hint):
            raise SettingsError(f"{source} is {text!r}; it has to be one of {', '.join(typing.get_args(hint))}")
        return text
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise SettingsError(f"{source} is {text!r}; it has to be true or false")
        return text.lower() == "true"
    try:
        return hint(text)
    except ValueError:
        raise SettingsError(f"{source} is {text!r}; it has to be a {_NUMBERS[hint]}") from None


_NUMBERS = {int: "whole number", float: "number"}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return (",".join(default) if isinstance(default, tuple) else str(default)) or "empty"
