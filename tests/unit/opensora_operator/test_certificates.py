"""The operator's certificate authority: made once, renewed in time, and trusted across the change."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
import stat
import threading
import time
from contextlib import closing
from typing import Any

import pytest
from cryptography import x509
from opensora_operator.certificates import (
    AUTHORITY_SECONDS,
    RETIRE_SECONDS,
    SERVER_SECONDS,
    Authorities,
    BadSecretError,
    ServerTls,
    ensure_authorities,
    from_secret,
    label_leader,
    make_authority,
    service_dns_names,
    to_secret,
)
from opensora_operator.plans import Object

NOW = time.time()
DAY = 86_400.0
NAMES = service_dns_names("opensora-progress", "opensora-system")


class Secrets:
    """The API server, as far as one Secret goes."""

    def __init__(self) -> None:
        self.secret: Object | None = None
        self.version = 0
        self.writes = 0
        self.before_write: list[Any] = []
        """What others do just before a write arrives."""

    async def read_secret(self, namespace: str, name: str) -> Object | None:
        return self.secret

    async def create_secret(self, manifest: Object) -> Object | None:
        await self._others()
        return self._store(manifest) if self.secret is None else None

    async def replace_secret(self, manifest: Object) -> Object | None:
        await self._others()
        assert self.secret is not None
        return self._store(manifest) if manifest["metadata"]["resourceVersion"] == str(self.version) else None

    def _store(self, manifest: Object) -> Object:
        self.version += 1
        self.writes += 1
        metadata = {**manifest["metadata"], "resourceVersion": str(self.version)}
        self.secret = {**manifest, "metadata": metadata}
        return self.secret

    async def _others(self) -> None:
        while self.before_write:
            await self.before_write.pop()


async def ensure_there(secrets: Secrets, now: float = NOW) -> Authorities:
    return await ensure_authorities(secrets, namespace="opensora-system", name="ca", now=now)


def ensure(secrets: Secrets, now: float = NOW) -> Authorities:
    return asyncio.run(ensure_there(secrets, now))


def ensure_among_others(secrets: Secrets, now: float = NOW) -> tuple[Authorities, Authorities]:
    """What a replica gets between whose reading and writing another one does the same; and what that one gets."""

    async def both() -> tuple[Authorities, Authorities]:
        other = asyncio.ensure_future(ensure_there(secrets, now))
        secrets.before_write.append(other)
        return await ensure_there(secrets, now), await other

    return asyncio.run(both())


def handshake(tls: ServerTls, *, bundle: str, name: str = NAMES[0], strict: bool = False) -> str:
    """Connect once; returns the serial number of the server's certificate. Raises what the client raises."""
    client = ssl.create_default_context(cadata=bundle)
    if strict:
        client.verify_flags |= ssl.VERIFY_X509_STRICT
    near, far = socket.socketpair()
    refused = []

    def serve() -> None:
        try:
            with tls.context.wrap_socket(far, server_side=True) as connection:
                connection.recv(1)
        except OSError as error:
            refused.append(error)
        finally:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with closing(near), client.wrap_socket(near, server_hostname=name) as connection:
            connection.sendall(b"x")
            shown = connection.getpeercert()
            assert shown is not None
            return str(shown["serialNumber"])
    finally:
        thread.join()


def server(authorities: Authorities, now: float = NOW) -> ServerTls:
    tls = ServerTls(NAMES)
    assert tls.use(authorities, now=now)
    return tls


def test_a_pod_knows_the_operator_by_the_names_of_its_service() -> None:
    authorities = Authorities(current=make_authority(NOW))
    tls = server(authorities)
    assert NAMES[0] == "opensora-progress.opensora-system.svc"
    for name in NAMES:
        handshake(tls, bundle=authorities.bundle, name=name, strict=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tls, bundle=authorities.bundle, name="kubernetes.default.svc")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tls, bundle=Authorities(current=make_authority(NOW)).bundle)


def test_the_authority_is_made_once_and_kept() -> None:
    secrets = Secrets()
    first = ensure(secrets)
    assert ensure(secrets, NOW + 100 * DAY).bundle == first.bundle
    assert secrets.writes == 1


def test_replicas_that_start_together_share_one_authority() -> None:
    secrets = Secrets()
    mine, other = ensure_among_others(secrets)
    assert mine.bundle == other.bundle
    assert secrets.writes == 1


def test_replicas_that_renew_together_share_one_successor() -> None:
    secrets = Secrets()
    ensure(secrets)
    late = NOW + AUTHORITY_SECONDS / 2 + DAY
    mine, other = ensure_among_others(secrets, late)
    assert mine.successor is not None
    assert mine.bundle == other.bundle
    assert secrets.writes == 2


def test_a_run_trusts_the_operator_through_the_change_of_authorities() -> None:
    # Both authorities are valid today, so that real clients can be asked.
    secrets, half = Secrets(), NOW - 2 * DAY
    end = half + AUTHORITY_SECONDS / 2
    first = ensure(secrets, half - AUTHORITY_SECONDS / 2)
    assert ensure(secrets, half - DAY).bundle == first.bundle

    during = ensure(secrets, half + DAY)
    assert during.current.certificate == first.current.certificate, "the old one goes on signing"
    assert during.bundle.startswith(first.bundle), "new attempts trust both"
    assert during.bundle.count("BEGIN CERTIFICATE") == 2
    handshake(server(during), bundle=first.bundle)
    handshake(server(during), bundle=during.bundle)

    after = ensure(secrets, end - RETIRE_SECONDS + DAY)
    assert after.current.certificate == (during.successor or first.current).certificate
    assert after.successor is None
    assert after.bundle == during.bundle.removeprefix(first.bundle)
    handshake(server(after), bundle=during.bundle)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server(after), bundle=first.bundle)


def test_there_is_always_an_authority_that_signs_for_long_enough() -> None:
    authorities = Authorities(current=make_authority(NOW))
    for day in range(0, 3650, 7):
        now = NOW + day * DAY
        authorities = authorities.due_at(now)
        assert authorities.current.ends - now >= RETIRE_SECONDS - 7 * DAY
        assert authorities.due_at(now) is authorities


def test_an_operator_that_was_off_for_years_starts_afresh() -> None:
    authorities = Authorities(current=make_authority(NOW)).due_at(NOW + 2000 * DAY)
    assert authorities.current.ends == pytest.approx(NOW + 2000 * DAY + AUTHORITY_SECONDS, abs=2)
    assert authorities.successor is None


def test_the_server_takes_a_new_certificate_without_a_restart() -> None:
    authorities = Authorities(current=make_authority(NOW))
    tls = server(authorities)
    first = handshake(tls, bundle=authorities.bundle)
    assert not tls.use(authorities, now=NOW + SERVER_SECONDS / 2 - DAY)
    assert handshake(tls, bundle=authorities.bundle) == first
    assert tls.use(authorities, now=NOW + SERVER_SECONDS / 2 + DAY)

    other = Authorities(current=make_authority(NOW))
    assert tls.use(other, now=NOW), "another authority is taken up at once"
    assert handshake(tls, bundle=other.bundle) != first
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tls, bundle=authorities.bundle)


def test_a_server_certificate_ends_with_its_authority() -> None:
    authority = make_authority(NOW - AUTHORITY_SECONDS + 3600)
    tls = server(Authorities(current=authority))
    handshake(tls, bundle=Authorities(current=authority).bundle)
    assert tls.use(Authorities(current=authority), now=NOW + 1801), "renewed at half of what is left"


def test_no_key_is_left_on_disk(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []

    load = ssl.SSLContext.load_cert_chain

    def watch(context: ssl.SSLContext, path: str) -> None:
        seen.append(stat.S_IMODE(os.stat(path).st_mode))
        load(context, path)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", watch)
    server(Authorities(current=make_authority(NOW)))
    assert seen == [0o600]
    assert list(tmp_path.iterdir()) == []


def test_the_secret_shows_the_public_part_by_itself() -> None:
    authorities = Authorities(current=make_authority(NOW), successor=make_authority(NOW))
    secret = to_secret(authorities, namespace="opensora-system", name="ca")
    content = {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
    assert sorted(content) == ["ca.crt", "current.crt", "current.key", "successor.crt", "successor.key"]
    assert content["ca.crt"] == authorities.bundle
    assert "PRIVATE" not in authorities.bundle
    assert secret["metadata"]["namespace"] == "opensora-system"
    assert from_secret(secret).bundle == authorities.bundle


@pytest.mark.parametrize("damage", ["empty", "no key", "no base64", "mixed", "other key"])
def test_a_secret_with_other_content_is_not_overwritten(damage: str) -> None:
    secrets = Secrets()
    ensure(secrets)
    assert secrets.secret is not None
    data = dict(secrets.secret["data"])
    if damage == "empty":
        data = {}
    elif damage == "no key":
        del data["current.key"]
    elif damage == "no base64":
        data["current.key"] = "???"
    elif damage == "mixed":
        other = to_secret(Authorities(current=make_authority(NOW)), namespace="a", name="b")["data"]
        data["current.key"] = other["current.key"]
    else:
        data["current.key"] = base64.b64encode(b"-----BEGIN RSA PRIVATE KEY-----\n").decode()
    secrets.secret = {**secrets.secret, "data": data}
    with pytest.raises(BadSecretError, match="Secret ca does not hold the operator's certificate authority"):
        ensure(secrets)
    assert secrets.writes == 1


def test_an_authority_can_sign_servers_and_no_further_authorities() -> None:
    certificate = make_authority(NOW).certificate
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)


def test_the_leader_is_named_by_a_label_of_its_own_pod() -> None:
    patches = []

    class Pods:
        async def patch_pod(self, namespace: str, name: str, patch: Object) -> Object | None:
            patches.append((namespace, name, patch))
            return None

    for leads in (True, False):
        asyncio.run(label_leader(Pods(), namespace="opensora-system", pod="operator-0", leads=leads))
    assert patches == [
        ("opensora-system", "operator-0", {"metadata": {"labels": {"opensora.dev/leader": "true"}}}),
        ("opensora-system", "operator-0", {"metadata": {"labels": {"opensora.dev/leader": None}}}),
    ]
