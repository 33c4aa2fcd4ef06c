"""Kubeconfigs: every kind of login, and everything that can be wrong with them."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from osctl.errors import ExitCode
from osctl.kubeconfig import Access, KubeconfigError, find_access


def _write(path: Path, user: dict[str, Any], *, cluster: dict[str, Any] | None = None, **more: Any) -> Path:
    content = {
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": "https://host:6443/", **(cluster or {})}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def _find(path: Path, *, context: str = "", **environment: str) -> Access:
    return find_access(str(path), context=context, environment={**os.environ, **environment})


def _plugin(tmp_path: Path, answer: str, *, code: int = 0, **more: Any) -> dict[str, Any]:
    script = tmp_path / "plugin.py"
    script.write_text(f"import sys, os\nsys.stderr.write('log in first\\n')\nprint({answer})\nsys.exit({code})\n")
    command = {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": [str(script)]}
    return {"exec": {**command, **more}}


def test_a_token_and_its_authority(tmp_path: Path) -> None:
    data = {"certificate-authority-data": base64.b64encode(b"PEM").decode()}
    access = _find(_write(tmp_path / "config", {"token": "t"}, cluster=data))
    assert (access.server, access.token, access.authority) == ("https://host:6443", "t", "PEM")
    assert (access.namespace, access.context) == ("default", "here")


def test_files_are_found_beside_the_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/token").write_text("t\n")
    (tmp_path / "sub/crt").write_text("CRT")
    (tmp_path / "sub/key").write_text("KEY")
    user = {"tokenFile": "token", "client-certificate": "crt", "client-key": "key"}
    access = _find(_write(tmp_path / "sub/config", user))
    assert (access.token, access.certificate, access.key) == ("t", "CRT", "KEY")


def test_an_exec_plugin_is_asked_and_told_about_the_cluster(tmp_path: Path) -> None:
    answer = "__import__('json').dumps({'status': {'token': os.environ['EXTRA'] + os.environ['KUBERNETES_EXEC_INFO']}})"
    more = {"provideClusterInfo": True, "env": [{"name": "EXTRA", "value": "x"}]}
    access = _find(_write(tmp_path / "config", _plugin(tmp_path, answer, **more)))
    assert access.token is not None
    info = json.loads(access.token[1:])
    assert access.token[0] == "x"
    assert info["kind"] == "ExecCredential"
    assert info["spec"]["cluster"]["server"] == "https://host:6443/"


def test_an_exec_plugin_may_give_a_certificate(tmp_path: Path) -> None:
    answer = '\'{"status": {"clientCertificateData": "CRT", "clientKeyData": "KEY"}}\''
    access = _find(_write(tmp_path / "config", _plugin(tmp_path, answer)))
    assert (access.certificate, access.key, access.token) == ("CRT", "KEY", None)


def test_a_plugin_that_fails_is_not_allowed_and_says_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(KubeconfigError, match="ended with 3: log in first") as caught:
        _find(_write(tmp_path / "config", _plugin(tmp_path, "''", code=3)))
    assert caught.value.exit_code == ExitCode.NOT_ALLOWED


def test_a_plugin_that_is_missing_says_how_to_install_it(tmp_path: Path) -> None:
    user = {
        "exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-login", "installHint": "get\nit"}
    }
    with pytest.raises(KubeconfigError, match=r"no-such-login .* is not installed") as caught:
        _find(_write(tmp_path / "config", user))
    assert caught.value.hint == "get it"


@pytest.mark.parametrize(
    ("user", "complaint"),
    [
        ({"auth-provider": {"name": "gcp"}}, "auth-provider"),
        ({"username": "me", "password": "p"}, "user name and password"),
        ({"tokenFile": "nowhere"}, "nowhere, which cannot be read"),
        ({"client-certificate-data": "%%%"}, "no base64"),
        ({"exec": {"apiVersion": "client.authentication.k8s.io/v1alpha1", "command": "x"}}, "apiVersion"),
    ],
)
def test_a_login_that_cannot_work_is_named(tmp_path: Path, user: dict[str, Any], complaint: str) -> None:
    with pytest.raises(KubeconfigError, match=complaint) as caught:
        _find(_write(tmp_path / "config", user))
    assert caught.value.hint


def test_a_plugin_that_prints_nonsense_is_named(tmp_path: Path) -> None:
    with pytest.raises(KubeconfigError, match="printed no ExecCredential"):
        _find(_write(tmp_path / "config", _plugin(tmp_path, "'hello'")))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "cannot be read"),
        ("- a list", "is no kubeconfig"),
        ("contexts: []", "has no current context"),
        ("current-context: gone\ncontexts: []", "has no context 'gone'"),
        ("contexts: [{context: {}}]", "an entry of contexts has no name"),
        ("current-context: a\ncontexts: [{name: a, context: {cluster: b}}]", "has no cluster 'b'"),
        (
            "current-context: a\ncontexts: [{name: a, context: {cluster: b}}]\nclusters: [{name: b, cluster: {}}]",
            "has no server address",
        ),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(KubeconfigError, match=complaint) as caught:
        _find(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_no_file_says_where_one_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(KubeconfigError, match=str(tmp_path / ".kube/config")):
        find_access(environment={"HOME": str(tmp_path)}, account=tmp_path / "none")


def test_several_files_are_one_and_the_first_wins(tmp_path: Path) -> None:
    first = _write(tmp_path / "one", {"token": "first"})
    more = {"contexts": [{"name": "there", "context": {"cluster": "c", "user": "u", "namespace": "n"}}]}
    second = _write(tmp_path / "two", {"token": "second"}, **{"current-context": "there"}, **more)
    environment = {"KUBECONFIG": f"{first}{os.pathsep}{second}"}
    assert find_access(environment=environment).context == "here"
    access = find_access(context="there", environment=environment)
    assert (access.token, access.namespace) == ("first", "n")


def test_inside_a_pod_the_service_account_is_used(tmp_path: Path) -> None:
    for name, text in (("token", "t"), ("ca.crt", "PEM"), ("namespace", "mine")):
        (tmp_path / name).write_text(text)
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    access = find_access(environment=environment, account=tmp_path)
    assert (access.server, access.namespace, access.token) == ("https://[fd00::1]:443", "mine", "t")
