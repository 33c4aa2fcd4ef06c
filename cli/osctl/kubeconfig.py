"""How to reach the API server: from a kubeconfig, or from the service account of a pod.

Understands what `kubectl` does: several files, contexts, tokens, client certificates, exec plugins, proxies. Not
understood, and said so: `auth-provider`, which Kubernetes itself no longer has.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from osctl.errors import ExitCode, OsctlError

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PLUGIN_SECONDS = 120
_PLUGIN_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


class KubeconfigError(OsctlError):
    """The kubeconfig is missing, broken, or does not lead to an API server."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """The API server, and who we are to it."""

    server: str
    """`https://host:port/path`."""
    namespace: str
    """Of the context; `default` where it names none."""
    source: str
    """Where this is from, for messages."""
    context: str = ""
    authority: str | None = None
    """Certificates that the server's is checked with, PEM; the system's unless given."""
    server_name: str | None = None
    """Name that the server's certificate is for, where it is not that of the address."""
    is_insecure: bool = False
    """Take any certificate."""
    proxy: str | None = None
    token: str | None = None
    certificate: str | None = None
    """Client certificate, PEM."""
    key: str | None = None
    """Its key, PEM."""


def find_access(
    path: str = "",
    *,
    context: str = "",
    environment: Mapping[str, str] = os.environ,
    account: Path = _ACCOUNT,
) -> Access:
    """Read the kubeconfig, and run its exec plugin where it has one.

    Args:
        path: a file; `$KUBECONFIG`, `~/.kube/config` or the pod's account unless given.
        context: of the file; its current one unless given.
        environment: of the process.
        account: where a pod has its service account.

    Raises:
        KubeconfigError: with what is wrong and what to do.
    """
    files = _files(path, environment)
    found = [file for file in files if file.is_file()]
    if found:
        return _from_files(found, context, environment)
    if not path and "KUBERNETES_SERVICE_HOST" in environment and (account / "token").is_file():
        return _from_account(account, environment)
    names = ", ".join(map(str, files)) or "~/.kube/config"
    raise KubeconfigError(
        f"there is no kubeconfig: {names} does not exist",
        hint="name one with --kubeconfig or $KUBECONFIG, or get one from whoever runs the cluster",
    )


def _files(path: str, environment: Mapping[str, str]) -> list[Path]:
    if path:
        return [Path(path).expanduser()]
    if environment.get("KUBECONFIG"):
        return [Path(part).expanduser() for part in environment["KUBECONFIG"].split(os.pathsep) if part]
    home = environment.get("HOME") or environment.get("USERPROFILE")
    return [Path(home) / ".kube" / "config"] if home else []


def _from_account(account: Path, environment: Mapping[str, str]) -> Access:
    host, port = environment["KUBERNETES_SERVICE_HOST"], environment.get("KUBERNETES_SERVICE_PORT", "443")
    name = f"[{host}]" if ":" in host else host
    namespace = account / "namespace"
    return Access(
        server=f"https://{name}:{port}",
        namespace=namespace.read_text().strip() if namespace.is_file() else "default",
        source="the service account of this pod",
        authority=(account / "ca.crt").read_text(),
        token=(account / "token").read_text().strip(),
    )


# ---------------------------------------------------------------------------------------------------------- the files


def _from_files(files: Sequence[Path], context: str, environment: Mapping[str, str]) -> Access:
    merged: dict[str, dict[str, tuple[Mapping[str, Any], Path]]] = {"clusters": {}, "users": {}, "contexts": {}}
    current = ""
    for file in files:
        content = _read(file)
        current = current or str(content.get("current-context") or "")
        for section, known in merged.items():
            for name, entry in _entries(content, section, file):
                known.setdefault(name, (entry, file))  # the first file wins
    source = os.pathsep.join(map(str, files))
    name = context or current
    if not name:
        raise KubeconfigError(
            f"{source} has no current context", hint="choose one with --context or `kubectl config use-context`"
        )
    chosen, _ = _entry(merged, "contexts", name, source)
    cluster, cluster_file = _entry(merged, "clusters", str(chosen.get("cluster") or ""), source)
    server = _word(cluster, "server", cluster_file) or ""
    if not _is_address(server):
        raise KubeconfigError(
            f"{source}: the cluster of context {name} has no server address that can be used: {server!r}",
            hint="correct the file: it is https://HOST:PORT",
        )
    proxy = _word(cluster, "proxy-url", cluster_file)
    if proxy and not _is_address(proxy):
        raise KubeconfigError(
            f"{source}: the cluster of context {name} has a proxy that cannot be used: {proxy!r}",
            hint="correct the file: it is http://HOST:PORT",
        )
    user: Mapping[str, Any] = {}
    user_file = cluster_file
    if chosen.get("user"):
        user, user_file = _entry(merged, "users", str(chosen["user"]), source)
    login = _login(user, user_file, cluster, environment)
    return Access(
        server=server.rstrip("/"),
        namespace=str(chosen.get("namespace") or "default"),
        source=source,
        context=name,
        authority=_text(cluster, "certificate-authority", cluster_file),
        server_name=_word(cluster, "tls-server-name", cluster_file),
        is_insecure=bool(cluster.get("insecure-skip-tls-verify")),
        proxy=proxy,
        **login,
    )


def _read(file: Path) -> Mapping[str, Any]:
    import yaml  # slow to import; a pod does without

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise KubeconfigError(f"{file} cannot be read: {first}", hint="correct the file, or name another") from error
    if not isinstance(content, Mapping):
        raise KubeconfigError(f"{file} is no kubeconfig", hint="name another file with --kubeconfig")
    return content


def _entries(content: Mapping[str, Any], section: str, file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and content of each entry of a section."""
    entries = content.get(section) or ()
    if not isinstance(entries, list | tuple):
        raise KubeconfigError(f"{file}: {section} is no list", hint="correct the file")
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise KubeconfigError(f"{file}: an entry of {section} has no name", hint="correct the file")
        inner = entry.get(section[:-1]) or {}
        if not isinstance(inner, Mapping):
            raise KubeconfigError(f"{file}: {section[:-1]} {entry['name']} has no fields", hint="correct the file")
        yield entry["name"], inner


def _word(entry: Mapping[str, Any], key: str, file: Path) -> str | None:
    """A text of one line; None where there is none."""
    value = entry.get(key)
    if value is None or value == "":
        return None
    text = value.strip() if isinstance(value, str) else ""
    if not text or not text.isascii() or not text.isprintable():
        raise KubeconfigError(f"{file}: {key} is no word", hint="correct the file")
    return text


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        return False


def _entry(
    merged: Mapping[str, Mapping[str, tuple[Mapping[str, Any], Path]]], section: str, name: str, source: str
) -> tuple[Mapping[str, Any], Path]:
    try:
        return merged[section][name]
    except KeyError:
        known = ", ".join(merged[section]) or "none"
        raise KubeconfigError(
            f"{source} has no {section[:-1]} {name!r}", hint=f"the {section} there are: {known}"
        ) from None


def _text(entry: Mapping[str, Any], key: str, file: Path) -> str | None:
    """A text that an entry has as base64 in `key-data`, or names as a file in `key`."""
    data = entry.get(f"{key}-data")
    if data:
        try:
            return base64.b64decode(str(data), validate=True).decode()
        except ValueError as error:  # no base64, or no text
            raise KubeconfigError(f"{file}: {key}-data is no base64 of a PEM text", hint="correct the file") from error
    return _file_text(entry.get(key), file)


def _file_text(name: Any, file: Path) -> str | None:
    if not name:
        return None
    path = file.parent / str(name)
    try:
        path = file.parent / Path(str(name)).expanduser()
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nobody of this name has a home
        raise KubeconfigError(f"{file} names {path}, which cannot be read: {error}", hint="correct the file") from error


# -------------------------------------------------------------------------------------------------------------- login


def _login(
    user: Mapping[str, Any], file: Path, cluster: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, str | None]:
    if user.get("auth-provider"):
        raise KubeconfigError(
            f"{file}: auth-provider is a login that Kubernetes no longer has",
            hint="make the kubeconfig anew with your cloud's tool: it then has an exec plugin",
            exit_code=ExitCode.NOT_ALLOWED,
        )
    if user.get("username"):
        raise KubeconfigError(
            f"{file}: a login by user name and password is one that Kubernetes no longer has",
            hint="use a token, a client certificate or an exec plugin",
            exit_code=ExitCode.NOT_ALLOWED,
        )
    login = {
        "token": _word(user, "token", file)
        or _word({"tokenFile": _file_text(user.get("tokenFile"), file)}, "tokenFile", file),
        "certificate": _text(user, "client-certificate", file),
        "key": _text(user, "client-key", file),
    }
    if user.get("exec"):
        if not isinstance(user["exec"], Mapping):
            raise KubeconfigError(f"{file}: exec has no fields", hint="correct the file")
        login = _ask_plugin(user["exec"], file, cluster, environment)
    return login


def _ask_plugin(
    plugin: Mapping[str, Any], file: Path, cluster: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, str | None]:
    command, version = str(plugin.get("command") or ""), str(plugin.get("apiVersion") or "")
    if version not in _PLUGIN_VERSIONS:
        raise KubeconfigError(
            f"{file}: the exec plugin {command} has apiVersion {version!r}",
            hint=f"plugins of {' and '.join(_PLUGIN_VERSIONS)} are understood: update it",
        )
    info: dict[str, Any] = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
    if plugin.get("provideClusterInfo"):
        wanted = ("server", "certificate-authority-data", "tls-server-name", "insecure-skip-tls-verify", "proxy-url")
        info["spec"]["cluster"] = {key: cluster[key] for key in wanted if key in cluster}
    try:
        variables = {str(entry["name"]): str(entry["value"]) for entry in plugin.get("env") or ()}
        words = [str(word) for word in plugin.get("args") or ()]
    except (TypeError, KeyError) as error:
        raise KubeconfigError(
            f"{file}: env or args of the exec plugin {command} is no list as it should be", hint="correct the file"
        ) from error
    program = command if os.sep not in command else str(file.parent / command)
    failed = f"the login program {command} of {file}"
    try:
        answer = subprocess.run(
            [program, *words],
            env={**environment, **variables, "KUBERNETES_EXEC_INFO": json.dumps(info)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PLUGIN_SECONDS,
        )
    except FileNotFoundError:
        hint = plugin.get("installHint") or f"install {command}, or make the kubeconfig anew"
        raise KubeconfigError(f"{failed} is not installed", hint=" ".join(str(hint).split())) from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:  # ValueError: a word that no program can be given
        raise KubeconfigError(f"{failed} did not work: {error}", hint=f"run `{command}` by hand") from error
    if answer.returncode:
        words = answer.stderr.strip().splitlines()
        raise KubeconfigError(
            f"{failed} ended with {answer.returncode}: {words[-1] if words else 'it said nothing'}",
            hint="log in again with your cluster's tool",
            exit_code=ExitCode.NOT_ALLOWED,
        )
    try:
        status = json.loads(answer.stdout)["status"]
        return {
            "token": _word(status, "token", file),
            "certificate": status.get("clientCertificateData"),
            "key": status.get("clientKeyData"),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KubeconfigError(f"{failed} printed no ExecCredential", hint=f"run `{command}` by hand") from error
