"""Who sends a progress message: the pod that a projected service-account token was made for.

A token is checked here, against the cluster's published keys, where its key is among them; else by the API server
(TokenReview), whose answers are kept for a minute.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from opensora_operator.allowances import Allowances
from opensora_operator.constants import GROUP
from opensora_operator.plans import Object

MAX_TOKEN_CHARACTERS = 8192
_KEEP_SECONDS = 60.0
_MAX_KEPT = 4096
_MAX_REVIEWS_AT_ONCE = 8
_BAD_BURST, _BAD_PER_SECOND = 20, 1.0
"""How many reviews with a bad end one sender may cause."""
_KEYS_SECONDS = 3600.0
_KEYS_RETRY_SECONDS = 60.0
_LEEWAY_SECONDS = 10.0
_SERVICE_ACCOUNT_PREFIX = "system:serviceaccount:"
_POD_UID = "authentication.kubernetes.io/pod-uid"


class BadTokenError(Exception):
    """The token is none, is over, or is not of this cluster."""


class TooManyBadTokensError(Exception):
    """The sender has had so many tokens refused that it has to wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__("too many tokens of this sender were refused")
        self.seconds = seconds


class WrongAudienceError(Exception):
    """The token was made for something else."""


class TokenApi(Protocol):
    """What checking tokens needs of the API server. Both raise `ConnectionError` when it does not answer."""

    async def review_token(self, token: str, *, audience: str) -> Object:
        """The status of a TokenReview."""

    async def read_public(self, path: str) -> Object | None:
        """The JSON at a path of the API server, such as `/openid/v1/jwks`; None where it may not be read."""


@dataclass(frozen=True, kw_only=True)
class PodIdentity:
    """The pod that a token was made for."""

    namespace: str
    uid: str


def audience_of(namespace: str, name: str) -> str:
    """The audience of the tokens of a run's pods."""
    return f"{GROUP}/{namespace}/{name}"


class TokenChecker:
    """Tells the pod of a token."""

    def __init__(self, api: TokenApi, *, clock: Callable[[], float] = time.time) -> None:
        self._api = api
        self._clock = clock
        self._keys: _ClusterKeys | None = None
        self._keys_read = -_KEYS_SECONDS
        self._reading_keys = asyncio.Lock()
        self._reviewing = asyncio.Semaphore(_MAX_REVIEWS_AT_ONCE)
        self._reviews: dict[bytes, _Review] = {}
        self._bad = Allowances(burst=_BAD_BURST, per_second=_BAD_PER_SECOND, clock=clock)

    async def identify(self, token: str, *, audience: str, sender: str) -> PodIdentity:
        """The pod of a token.

        Args:
            token: as it was sent.
            audience: what it has to be made for.
            sender: the address that it came from.

        Raises:
            BadTokenError: the token is not valid.
            WrongAudienceError: it is not meant for this audience.
            TooManyBadTokensError: the API server is not asked for this sender any more.
            ConnectionError: the API server does not answer.
        """
        parsed = _parse(token)
        claims = parsed.claims
        if not _holds_now(claims, self._clock()):
            raise BadTokenError("the token is not valid at this time")
        audiences = claims.get("aud")
        if audience not in (audiences if isinstance(audiences, list) else [audiences]):
            raise WrongAudienceError(f"the token is not for {audience}")
        keys = await self._cluster_keys(parsed.key_id)
        if keys is None or not keys.know(parsed):
            return await self._review(token, audience=audience, sender=sender)
        keys.check(parsed)
        return _identity(claims)

    # ------------------------------------------------------------------------------------------ checked here

    async def _cluster_keys(self, key_id: str) -> _ClusterKeys | None:
        """The published keys; read again now and then, and soon where one is not among them. None: not readable."""
        async with self._reading_keys:
            is_known = self._keys is not None and self._keys.has(key_id)
            age = self._clock() - self._keys_read
            if age >= (_KEYS_SECONDS if is_known else _KEYS_RETRY_SECONDS):
                self._keys = await self._read_keys()
                self._keys_read = self._clock()
            return self._keys

    async def _read_keys(self) -> _ClusterKeys | None:
        configuration = await self._api.read_public("/.well-known/openid-configuration")
        key_set = await self._api.read_public("/openid/v1/jwks") if configuration is not None else None
        if configuration is None or key_set is None:
            return None
        return _ClusterKeys(issuer=configuration["issuer"], key_set=key_set)

    # ------------------------------------------------------------------------------------ checked by the server

    async def _review(self, token: str, *, audience: str, sender: str) -> PodIdentity:
        digest = hashlib.sha256(f"{audience}\n{token}".encode()).digest()
        review = self._reviews.get(digest)
        if review is None or review.expires <= self._clock():
            if (seconds := self._bad.seconds_left(sender)) > 0:
                raise TooManyBadTokensError(seconds)
            async with self._reviewing:
                status = await self._api.review_token(token, audience=audience)
            review = _Review(expires=self._clock() + _KEEP_SECONDS, result=_result(status, audience=audience))
            self._reviews.pop(digest, None)  # the oldest come first
            while len(self._reviews) >= _MAX_KEPT:
                del self._reviews[next(iter(self._reviews))]
            self._reviews[digest] = review
            if isinstance(review.result, str):
                self._bad.take(sender)
        if isinstance(review.result, str):
            raise BadTokenError(review.result)
        return review.result


@dataclass(frozen=True, kw_only=True)
class _Review:
    expires: float
    result: PodIdentity | str
    """The pod, or why there is none."""


def _result(status: Mapping[str, Any], *, audience: str) -> PodIdentity | str:
    """The pod that a review names, or why it names none."""
    if not status.get("authenticated"):
        return "the token is not valid"
    if audience not in (status.get("audiences") or ()):
        return f"the token is not for {audience}"
    user = status.get("user") or {}
    username = user.get("username") or ""
    uids: Sequence[str] = (user.get("extra") or {}).get(_POD_UID) or ()
    if not username.startswith(_SERVICE_ACCOUNT_PREFIX) or len(uids) != 1:
        return "the token is not that of a pod"
    return PodIdentity(namespace=username.removeprefix(_SERVICE_ACCOUNT_PREFIX).partition(":")[0], uid=uids[0])


# ------------------------------------------------------------------------------------------------------ JSON Web Token


@dataclass(frozen=True)
class _Token:
    """The parts of a JSON Web Token (RFC 7519), not yet believed."""

    header: Mapping[str, Any]
    claims: Mapping[str, Any]
    signed: bytes
    signature: bytes

    @property
    def key_id(self) -> str:
        return str(self.header.get("kid"))


def _parse(token: str) -> _Token:
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise BadTokenError("the token is too long")
    try:
        head, body, signature = token.encode("ascii").split(b".")
        header, claims = json.loads(_decoded(head)), json.loads(_decoded(body))
        parsed = _Token(header=header, claims=claims, signed=head + b"." + body, signature=_decoded(signature))
    except (ValueError, RecursionError) as error:
        raise BadTokenError("that is no token") from error
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise BadTokenError("that is no token")
    return parsed


def _decoded(part: bytes) -> bytes:
    return base64.b64decode(part + b"=" * (-len(part) % 4), altchars=b"-_", validate=True)


def _holds_now(claims: Mapping[str, Any], now: float) -> bool:
    begins, ends = claims.get("nbf", 0), claims.get("exp")
    return (
        isinstance(begins, int | float)
        and isinstance(ends, int | float)
        and begins - _LEEWAY_SECONDS <= now < ends + _LEEWAY_SECONDS
    )


def _identity(claims: Mapping[str, Any]) -> PodIdentity:
    bound = claims.get("kubernetes.io")
    pod = bound.get("pod") if isinstance(bound, dict) else None
    if not isinstance(bound, dict) or not isinstance(pod, dict):
        raise BadTokenError("the token is not that of a pod")
    return PodIdentity(namespace=str(bound.get("namespace")), uid=str(pod.get("uid")))


_RSA_HASHES = {"RS256": hashes.SHA256(), "RS384": hashes.SHA384(), "RS512": hashes.SHA512()}
_CURVES: Mapping[str, tuple[ec.EllipticCurve, hashes.HashAlgorithm]] = {
    "ES256": (ec.SECP256R1(), hashes.SHA256()),
    "ES384": (ec.SECP384R1(), hashes.SHA384()),
    "ES512": (ec.SECP521R1(), hashes.SHA512()),
}
"""Signature algorithms of RFC 7518 that Kubernetes uses."""


class _ClusterKeys:
    """The keys that the API server signs tokens with (RFC 7517)."""

    def __init__(self, *, issuer: str, key_set: Mapping[str, Any]) -> None:
        self._issuer = issuer
        self._keys = {str(key.get("kid")): _public_key(key) for key in key_set.get("keys", ())}

    def has(self, key_id: str) -> bool:
        return key_id in self._keys

    def know(self, token: _Token) -> bool:
        """Whether the token can be checked here: by its own word a usable key has signed it."""
        return self._keys.get(token.key_id) is not None and token.claims.get("iss") == self._issuer

    def check(self, token: _Token) -> None:
        """Believe the token's claims, or raise `BadTokenError`."""
        algorithm, key = str(token.header.get("alg")), self._keys[token.key_id]
        try:
            if isinstance(key, rsa.RSAPublicKey) and algorithm in _RSA_HASHES:
                key.verify(token.signature, token.signed, padding.PKCS1v15(), _RSA_HASHES[algorithm])
                return
            if isinstance(key, ec.EllipticCurvePublicKey) and algorithm in _CURVES:
                curve, digest = _CURVES[algorithm]
                if key.curve.name == curve.name:
                    half = len(token.signature) // 2
                    r, s = (int.from_bytes(part, "big") for part in (token.signature[:half], token.signature[half:]))
                    key.verify(encode_dss_signature(r, s), token.signed, ec.ECDSA(digest))
                    return
        except InvalidSignature as error:
            raise BadTokenError("the token is not signed by this cluster") from error
        raise BadTokenError(f"the token's algorithm {algorithm[:20]} is not that of its key")


def _public_key(key: Mapping[str, Any]) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey | None:
    """A key of the set; None for a kind that is not used here."""

    def number(name: str) -> int:
        return int.from_bytes(_decoded(key[name].encode()), "big")

    if key.get("kty") == "RSA":
        return rsa.RSAPublicNumbers(number("e"), number("n")).public_key()
    curves = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
    curve = curves.get(key.get("crv", ""))
    if key.get("kty") != "EC" or curve is None:
        return None
    return ec.EllipticCurvePublicNumbers(number("x"), number("y"), curve).public_key()
