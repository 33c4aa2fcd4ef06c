"""Logins of every kind over real TLS: what gets in, and what those are told who do not."""

from __future__ import annotations

import base64
import datetime
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from authority import DAY, NOW, Authority, Pair
from fake_api import RUNS, FakeApi
from hypothesis import given
from hypothesis import strategies as st
from osctl.certificates import ends_at

EMPTY = {"columnDefinitions": [], "rows": [], "metadata": {}}
TOKEN = "a-good-token"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("the cluster")


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["tls1.2", "tls1.3"])
def cluster(authority: Authority, home: Path, request: pytest.FixtureRequest) -> Iterator[FakeApi]:
    """An API server that knows one token and whoever has a certificate of its authority."""
    with _serve(authority, authority.issue("cluster", is_server=True), home, version=request.param) as api:
        yield api


def _serve(authority: Authority, pair: Pair, home: Path, *, version: ssl.TLSVersion | None = None) -> FakeApi:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (home / "server.pem").write_text(pair.certificate + pair.key)
    context.load_cert_chain(home / "server.pem")
    context.load_verify_locations(cadata=authority.pem)
    context.verify_mode = ssl.CERT_OPTIONAL
    if version is not None:
        context.minimum_version = context.maximum_version = version
    api = FakeApi(tls=context, knows=_knows)
    api.on("GET", RUNS, EMPTY)
    return api


def _knows(headers: Any, certificate: Any) -> bool:
    return bool(headers.get("Authorization") == f"Bearer {TOKEN}" or certificate)


def _login(home: Path, api: FakeApi, authority: Authority | None, **user: Any) -> None:
    cluster: dict[str, Any] = {"server": api.url}
    if authority is not None:
        cluster["certificate-authority-data"] = _base64(authority.pem)
    config = {
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": cluster | user.pop("cluster", {})}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
    }
    (home / ".kube").mkdir(exist_ok=True)
    (home / ".kube/config").write_text(yaml.safe_dump(config))


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _plugin(home: Path, **status: Any) -> dict[str, Any]:
    """An exec plugin that gives this."""
    version = "client.authentication.k8s.io/v1"
    answer = {"apiVersion": version, "kind": "ExecCredential", "status": status}
    (home / "login.py").write_text(f"import json; print(json.dumps({answer!r}))")
    return {"exec": {"apiVersion": version, "command": sys.executable, "args": [str(home / "login.py")]}}


# ---------------------------------------------------------------------------------------------------------- who gets in


def test_a_token_gets_in(cluster: FakeApi, authority: Authority, osctl: Any, home: Path) -> None:
    _login(home, cluster, authority, token=TOKEN)
    assert osctl("get").code == 0


def test_a_token_of_a_file_gets_in_with_the_line_break_at_its_end(
    cluster: FakeApi, authority: Authority, osctl: Any, home: Path
) -> None:
    (home / ".kube").mkdir()
    (home / ".kube/token").write_text(f"{TOKEN}\n")
    _login(home, cluster, authority, tokenFile="token")
    assert osctl("get").code == 0


@pytest.mark.parametrize("as_files", [False, True], ids=["data", "files"])
def test_a_client_certificate_gets_in(
    cluster: FakeApi, authority: Authority, osctl: Any, home: Path, as_files: bool
) -> None:
    pair = authority.issue("alice")
    login = {"client-certificate-data": _base64(pair.certificate), "client-key-data": _base64(pair.key)}
    if as_files:
        (home / ".kube").mkdir()
        (home / ".kube/me.crt").write_text(pair.certificate)
        (home / ".kube/me.key").write_text(pair.key)
        login = {"client-certificate": "me.crt", "client-key": "me.key"}
    _login(home, cluster, authority, **login)
    assert osctl("get").code == 0


def test_an_exec_plugin_gets_in_by_token_or_certificate(
    cluster: FakeApi, authority: Authority, osctl: Any, home: Path
) -> None:
    _login(home, cluster, authority, **_plugin(home, token=TOKEN))
    assert osctl("get").code == 0
    pair = authority.issue("alice")
    _login(home, cluster, authority, **_plugin(home, clientCertificateData=pair.certificate, clientKeyData=pair.key))
    assert osctl("get").code == 0


def test_a_name_of_ones_own_is_what_the_certificate_is_checked_with(
    authority: Authority, osctl: Any, home: Path
) -> None:
    pair = authority.issue("kubernetes.default", is_server=True)
    with _serve(authority, pair, home) as api:
        _login(home, api, authority, token=TOKEN, cluster={"tls-server-name": "kubernetes.default"})
        assert osctl("get").code == 0
        _login(home, api, authority, token=TOKEN)
        assert "not to be trusted" in osctl("get").err


# --------------------------------------------------------------------------------------------------------- who does not


def _refused(osctl: Any, code: int, line: str, hint: str) -> None:
    """By a command, and by doctor in its first row."""
    result = osctl("get")
    first, second = result.err.splitlines()
    assert (result.code, result.out) == (code, ""), result.err
    assert line in first
    assert hint in second
    doctor = osctl("doctor")
    assert doctor.code == 1
    assert line in " ".join(doctor.out.partition("\nclock")[0].split())
    assert doctor.err == "1 failed, 17 not seen\n"


def test_a_refused_token(cluster: FakeApi, authority: Authority, osctl: Any, home: Path) -> None:
    _login(home, cluster, authority, token="expired")
    _refused(osctl, 8, "does not know you", "log in again")


def test_an_exec_plugin_with_a_token_that_is_refused(
    cluster: FakeApi, authority: Authority, osctl: Any, home: Path
) -> None:
    _login(home, cluster, authority, **_plugin(home, token="expired"))
    _refused(osctl, 8, "does not know you", "log in again")


def test_no_login_at_all(cluster: FakeApi, authority: Authority, osctl: Any, home: Path) -> None:
    _login(home, cluster, authority)
    _refused(osctl, 8, "does not know you", "log in again")


def test_an_expired_client_certificate(cluster: FakeApi, authority: Authority, osctl: Any, home: Path) -> None:
    pair = authority.issue("alice", end=NOW - DAY)
    _login(
        home, cluster, authority,
        **{"client-certificate-data": _base64(pair.certificate), "client-key-data": _base64(pair.key)},
    )  # fmt: skip
    _refused(osctl, 8, "has expired: it was good until", "log in again")


def test_an_expired_certificate_that_the_server_answers_with_401(authority: Authority, osctl: Any, home: Path) -> None:
    """As Kubernetes' own API server does, which looks at certificates after the handshake."""
    pair = authority.issue("alice", end=NOW - DAY)
    with _serve(authority, authority.issue("cluster", is_server=True), home) as api:
        api.tls.verify_mode = ssl.CERT_NONE  # type: ignore[union-attr]
        _login(
            home, api, authority,
            **{"client-certificate-data": _base64(pair.certificate), "client-key-data": _base64(pair.key)},
        )  # fmt: skip
        _refused(osctl, 8, "has expired: it was good until", "log in again")


@pytest.mark.parametrize("end", [NOW + DAY, NOW.replace(year=2049), NOW.replace(year=2051, day=1)])
def test_the_end_of_a_certificate_is_read_from_it(authority: Authority, end: datetime.datetime) -> None:
    pair = authority.issue("alice" * 10, end=end)
    assert ends_at(pair.certificate) == int(end.timestamp())
    assert ends_at(pair.certificate + authority.pem) == int(end.timestamp()), "the first of a chain"


@given(st.binary(max_size=200))
def test_what_is_no_certificate_has_no_end(content: bytes) -> None:
    text = base64.b64encode(content).decode()
    assert ends_at(text) is None
    assert ends_at(f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n") is None


def test_a_client_certificate_of_another_authority(
    cluster: FakeApi, authority: Authority, osctl: Any, home: Path
) -> None:
    pair = Authority("another").issue("alice")
    _login(
        home, cluster, authority,
        **{"client-certificate-data": _base64(pair.certificate), "client-key-data": _base64(pair.key)},
    )  # fmt: skip
    _refused(osctl, 8, "does not take the client certificate", "log in again")


def test_a_key_of_another_certificate(cluster: FakeApi, authority: Authority, osctl: Any, home: Path) -> None:
    one, other = authority.issue("alice"), authority.issue("bob")
    _login(
        home, cluster, authority,
        **{"client-certificate-data": _base64(one.certificate), "client-key-data": _base64(other.key)},
    )  # fmt: skip
    _refused(osctl, 1, "a certificate or key cannot be used", "make the kubeconfig anew")


def test_a_wrong_authority(cluster: FakeApi, osctl: Any, home: Path) -> None:
    _login(home, cluster, Authority("another"), token=TOKEN)
    _refused(osctl, 1, "not to be trusted", "make the kubeconfig anew")


def test_no_authority_where_the_system_knows_none(cluster: FakeApi, osctl: Any, home: Path) -> None:
    _login(home, cluster, None, token=TOKEN)
    _refused(osctl, 1, "not to be trusted", "make the kubeconfig anew")


def test_an_authority_that_is_none(cluster: FakeApi, osctl: Any, home: Path) -> None:
    _login(home, cluster, None, token=TOKEN, cluster={"certificate-authority-data": _base64("nothing")})
    _refused(osctl, 1, "a certificate or key cannot be used", "make the kubeconfig anew")


def test_a_server_whose_own_certificate_has_expired(authority: Authority, osctl: Any, home: Path) -> None:
    with _serve(authority, authority.issue("cluster", end=NOW - DAY, is_server=True), home) as api:
        _login(home, api, authority, token=TOKEN)
        _refused(osctl, 1, "certificate has expired", "make the kubeconfig anew")


def test_any_certificate_is_taken_where_one_insists(cluster: FakeApi, osctl: Any, home: Path) -> None:
    _login(home, cluster, None, token=TOKEN, cluster={"insecure-skip-tls-verify": True})
    assert osctl("get").code == 0


def test_plain_http_where_tls_is_spoken(cluster: FakeApi, osctl: Any, home: Path) -> None:
    _login(home, cluster, None, token=TOKEN, cluster={"server": cluster.url.replace("https", "http")})
    result = osctl("get")
    assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 2)


def test_tls_where_plain_http_is_spoken(api: FakeApi, osctl: Any, home: Path) -> None:
    _login(home, api, None, token=TOKEN, cluster={"server": api.url.replace("http", "https")})
    result = osctl("get")
    assert (result.code, result.out, len(result.err.splitlines())) == (1, "", 2)
    assert "cannot be reached" in result.err
