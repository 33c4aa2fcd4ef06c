"""The operator's own certificate authority, and the certificate of its progress server.

The authority lives in a Secret that all replicas share. Long before it ends it gets a successor, and both are trusted
from then on: the bundle of a run's pods is fixed when an attempt starts, so the old authority goes on signing until
shortly before its end. Each replica has a server certificate of its own, which lives in memory alone.
"""

from __future__ import annotations

import base64
import logging
import os
import ssl
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from opensora_operator.constants import GROUP, MANAGER
from opensora_operator.plans import Object

logger = logging.getLogger(__name__)

_DAY = 86_400.0
AUTHORITY_SECONDS = 730 * _DAY
"""Life of an authority. Its successor is made at half of it."""
RETIRE_SECONDS = 30 * _DAY
"""An authority with less time left signs nothing any more, if it has a successor."""
SERVER_SECONDS = 30 * _DAY
"""Life of a server certificate. It is renewed at half of it."""
_BACKDATE_SECONDS = 300.0
"""Clocks of nodes differ."""
LEADER_LABEL = f"{GROUP}/leader"
"""Label of the leader's pod; the progress Service selects it."""


class SecretApi(Protocol):
    """What this module needs of the API server."""

    async def read_secret(self, namespace: str, name: str) -> Object | None:
        """A Secret; None where there is none."""

    async def create_secret(self, manifest: Object) -> Object | None:
        """Make it; None where somebody else was first (409)."""

    async def replace_secret(self, manifest: Object) -> Object | None:
        """Replace it by its `resourceVersion`; None where it has changed since (409)."""


class PodLabelApi(Protocol):
    """What naming the leader needs of the API server."""

    async def patch_pod(self, namespace: str, name: str, patch: Object) -> Object | None:
        """Merge-patch a pod; None where there is none."""


class BadSecretError(Exception):
    """The Secret holds something else."""


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A key, and the certificate that says that it may sign."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def ends(self) -> float:
        return self.certificate.not_valid_after_utc.timestamp()

    @property
    def middle(self) -> float:
        """Half of its life."""
        return (self.certificate.not_valid_before_utc.timestamp() + self.ends) / 2


@dataclass(frozen=True, kw_only=True)
class Authorities:
    """The authority that signs, and the one that will."""

    current: Authority
    successor: Authority | None = None

    @property
    def bundle(self) -> str:
        """What pods have to trust: PEM."""
        known = [self.current, self.successor]
        return "".join(_pem(authority.certificate).decode() for authority in known if authority is not None)

    def due_at(self, now: float) -> Authorities:
        """These, with what the time asks for: a successor at half of the life, and its turn near the end."""
        successor = self.successor
        if successor is None and now >= self.current.middle:
            successor = make_authority(now)
        if successor is not None and now >= self.current.ends - RETIRE_SECONDS:
            return Authorities(current=successor).due_at(now)
        return self if successor is self.successor else Authorities(current=self.current, successor=successor)


def make_authority(now: float) -> Authority:
    """A new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{MANAGER} progress {_utc(now):%Y-%m-%d}")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    certificate = (
        _builder(name, issuer=name, key=key.public_key(), now=now, seconds=AUTHORITY_SECONDS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate=certificate, key=key)


# ----------------------------------------------------------------------------------------------------------- the Secret


async def ensure_authorities(api: SecretApi, *, namespace: str, name: str, now: float) -> Authorities:
    """The authorities of the Secret, made where it is missing and renewed where that is due.

    Any number of replicas may do this at the same time: the first one wins, the others take what it made.

    Raises:
        BadSecretError: there is a Secret of this name with other content.
    """
    while True:
        secret = await api.read_secret(namespace, name)
        if secret is None:
            made = Authorities(current=make_authority(now))
            if await api.create_secret(to_secret(made, namespace=namespace, name=name)) is not None:
                logger.info("made the certificate authority of the progress channel, Secret %s", name)
                return made
            continue
        known = from_secret(secret)
        due = known.due_at(now)
        if due is known:
            return known
        version = secret["metadata"]["resourceVersion"]
        if await api.replace_secret(to_secret(due, namespace=namespace, name=name, version=version)) is not None:
            logger.info("renewed the certificate authority of the progress channel, Secret %s", name)
            return due


def to_secret(authorities: Authorities, *, namespace: str, name: str, version: str | None = None) -> Object:
    """The Secret that holds the authorities."""
    content = {"ca.crt": authorities.bundle.encode(), **_files("current", authorities.current)}
    if authorities.successor is not None:
        content |= _files("successor", authorities.successor)
    labels = {"app.kubernetes.io/managed-by": MANAGER, "app.kubernetes.io/part-of": "opensora"}
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": metadata if version is None else {**metadata, "resourceVersion": version},
        "data": {key: base64.b64encode(value).decode() for key, value in content.items()},
    }


def from_secret(secret: Object) -> Authorities:
    """The authorities that a Secret holds.

    Raises:
        BadSecretError: it holds something else.
    """
    try:
        content = {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}
        current = _authority("current", content)
        return Authorities(
            current=current, successor=_authority("successor", content) if "successor.crt" in content else None
        )
    except (KeyError, ValueError, TypeError) as error:
        raise BadSecretError(
            f"the Secret {secret['metadata']['name']} does not hold the operator's certificate authority: {error!r}; "
            "delete it, and a new one is made, which running attempts do not trust"
        ) from error


def _files(prefix: str, authority: Authority) -> dict[str, bytes]:
    return {f"{prefix}.crt": _pem(authority.certificate), f"{prefix}.key": _key_pem(authority.key)}


def _authority(prefix: str, content: Mapping[str, bytes]) -> Authority:
    key = serialization.load_pem_private_key(content[f"{prefix}.key"], password=None)
    certificate = x509.load_pem_x509_certificate(content[f"{prefix}.crt"])
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise ValueError(f"{prefix}.key and {prefix}.crt do not belong together")
    return Authority(certificate=certificate, key=key)


# ----------------------------------------------------------------------------------------------------------- the server


class ServerTls:
    """The TLS side of the progress server: its context takes each new certificate without a restart.

    Args:
        dns_names: by which pods reach it.
    """

    def __init__(self, dns_names: Sequence[str]) -> None:
        self._dns_names = tuple(dns_names)
        self._signer: x509.Certificate | None = None
        self._renew_at = 0.0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2

    def use(self, authorities: Authorities, *, now: float) -> bool:
        """Take a new certificate, if the authority has changed or the old one is at half of its life.

        Connections that are open keep the old one. Returns whether there is a new one.
        """
        signer = authorities.current
        if self._signer == signer.certificate and now < self._renew_at:
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        seconds = min(SERVER_SECONDS, max(0.0, signer.ends - now))
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._dns_names[0][:64])])
        names = x509.SubjectAlternativeName([x509.DNSName(dns_name) for dns_name in self._dns_names])
        certificate = (
            _builder(name, issuer=signer.certificate.subject, key=key.public_key(), now=now, seconds=seconds)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
            .sign(signer.key, hashes.SHA256())
        )
        self._load(_key_pem(key) + _pem(certificate))
        self._signer, self._renew_at = signer.certificate, now + seconds / 2
        return True

    def _load(self, pem: bytes) -> None:
        """Python's ssl reads keys from files alone; this one exists for a moment, for us alone."""
        descriptor, path = tempfile.mkstemp(prefix="opensora-tls-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(pem)
            self.context.load_cert_chain(path)
        finally:
            os.unlink(path)


def service_dns_names(service: str, namespace: str) -> tuple[str, ...]:
    """The names of a Service within the cluster."""
    return (f"{service}.{namespace}.svc", f"{service}.{namespace}", f"{service}.{namespace}.svc.cluster.local")


async def label_leader(api: PodLabelApi, *, namespace: str, pod: str, leads: bool) -> None:
    """Put the leader's label on the operator's own pod, or take it off.

    To be called on winning the election, and with `leads` false at the start and on losing it: a container that was
    restarted finds the label of its previous life.
    """
    await api.patch_pod(namespace, pod, {"metadata": {"labels": {LEADER_LABEL: "true" if leads else None}}})


# --------------------------------------------------------------------------------------------------------- X.509 parts


def _builder(
    subject: x509.Name, *, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: float, seconds: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_utc(now - _BACKDATE_SECONDS))
        .not_valid_after(_utc(now + seconds))
    )


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
