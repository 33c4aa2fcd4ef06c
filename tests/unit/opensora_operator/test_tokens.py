"""Whose token is believed: checked with the cluster's keys, or by its API server."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from opensora_operator.plans import Object
from opensora_operator.tokens import (
    BadTokenError,
    PodIdentity,
    TokenChecker,
    TooManyBadTokensError,
    WrongAudienceError,
    audience_of,
)
from progress_channel import NAMESPACE, POD, RUN, PretendedCluster, claims, encoded

AUDIENCE = audience_of(NAMESPACE, RUN)
ISSUER = "https://kubernetes.default.svc.cluster.local"


def integer(number: int) -> str:
    return encoded(number.to_bytes((number.bit_length() + 7) // 8, "big"))


class RsaKey:
    """A key of a cluster that signs as kube-apiserver does by default."""

    algorithm = "RS256"

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def published(self, key_id: str) -> Object:
        numbers = self._key.public_key().public_numbers()
        return {"kty": "RSA", "kid": key_id, "use": "sig", "n": integer(numbers.n), "e": integer(numbers.e)}

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())


class EcKey:
    """A key on the curve P-256."""

    algorithm = "ES256"

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def published(self, key_id: str) -> Object:
        numbers = self._key.public_key().public_numbers()
        return {"kty": "EC", "kid": key_id, "crv": "P-256", "x": integer(numbers.x), "y": integer(numbers.y)}

    def sign(self, data: bytes) -> bytes:
        r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


@pytest.fixture(scope="module", params=[RsaKey, EcKey], ids=["RSA", "EC"])
def key(request: pytest.FixtureRequest) -> Any:
    return request.param()


class OpenCluster(PretendedCluster):
    """A cluster whose keys can be read."""

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        self.keys = keys
        self.num_reads = 0

    async def read_public(self, path: str) -> Object | None:
        self.num_reads += 1
        if path == "/.well-known/openid-configuration":
            return {"issuer": ISSUER, "jwks_uri": "https://10.0.0.1/openid/v1/jwks"}
        assert path == "/openid/v1/jwks"
        return {"keys": [key.published(key_id) for key_id, key in self.keys.items()]}


def signed(key: Any, *, key_id: str = "one", algorithm: str | None = None, **changes: Any) -> str:
    extra = {name: changes.pop(name) for name in ("exp", "nbf", "iss") if name in changes}
    header = {"alg": algorithm or key.algorithm, "kid": key_id}
    text = f"{encoded(header)}.{encoded(claims(**changes) | extra)}"
    return f"{text}.{encoded(key.sign(text.encode()))}"


def identify(checker: TokenChecker, token: str, *, audience: str = AUDIENCE, sender: str = "10.1.2.3") -> PodIdentity:
    return asyncio.run(checker.identify(token, audience=audience, sender=sender))


# ---------------------------------------------------------------------------------------------- by the cluster's keys


def test_a_token_that_the_cluster_has_signed_names_its_pod(key: Any) -> None:
    cluster = OpenCluster(one=key)
    checker = TokenChecker(cluster)
    for _ in range(3):
        assert identify(checker, signed(key)) == PodIdentity(namespace=NAMESPACE, uid=POD)
    assert cluster.num_reviews == 0
    assert cluster.num_reads == 2, "the keys are read once"


def test_a_token_that_was_changed_is_refused(key: Any) -> None:
    head, _, signature = signed(key).split(".")
    body = encoded(claims(pod="another"))
    with pytest.raises(BadTokenError, match="not signed by this cluster"):
        identify(TokenChecker(OpenCluster(one=key)), f"{head}.{body}.{signature}")


def test_another_clusters_token_is_refused(key: Any) -> None:
    with pytest.raises(BadTokenError, match="not signed by this cluster"):
        identify(TokenChecker(OpenCluster(one=key)), signed(type(key)()))


@pytest.mark.parametrize("algorithm", ["none", "HS256", "RS512x", ["RS256"]])
def test_the_token_does_not_choose_how_it_is_checked(key: Any, algorithm: Any) -> None:
    with pytest.raises(BadTokenError, match="algorithm"):
        identify(TokenChecker(OpenCluster(one=key)), signed(key, algorithm=algorithm))


@pytest.mark.parametrize(
    "changes",
    [{"exp": 100}, {"exp": None}, {"exp": "never"}, {"nbf": time.time() + 3600}, {"exp": float("nan")}],
    ids=["over", "without end", "no number", "not yet", "nan"],
)
def test_a_token_holds_for_its_time(key: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(BadTokenError, match="not valid at this time"):
        identify(TokenChecker(OpenCluster(one=key)), signed(key, **changes))


def test_a_token_for_something_else_is_refused(key: Any) -> None:
    checker = TokenChecker(OpenCluster(one=key))
    with pytest.raises(WrongAudienceError, match=f"not for {AUDIENCE}"):
        identify(checker, signed(key, audience="https://kubernetes.default.svc"))
    with pytest.raises(WrongAudienceError):
        identify(checker, signed(key, audience=audience_of("elsewhere", RUN)))


def test_a_token_that_is_bound_to_no_pod_is_refused(key: Any) -> None:
    text = f"{encoded({'alg': key.algorithm, 'kid': 'one'})}.{encoded(claims() | {'kubernetes.io': {}})}"
    with pytest.raises(BadTokenError, match="not that of a pod"):
        identify(TokenChecker(OpenCluster(one=key)), f"{text}.{encoded(key.sign(text.encode()))}")


def test_new_keys_of_the_cluster_are_found(key: Any) -> None:
    now = [time.time()]
    cluster = OpenCluster(one=key)
    checker = TokenChecker(cluster, clock=lambda: now[0])
    identify(checker, signed(key))
    new = type(key)()
    cluster.keys["two"] = new
    token = signed(new, key_id="two")
    with pytest.raises(BadTokenError):
        identify(checker, token)
    assert cluster.num_reviews == 1, "the API server is asked about a key that is not known"
    assert cluster.num_reads == 2, "and not for its keys, at most once a minute"
    now[0] += 61
    assert identify(checker, token).uid == POD
    del cluster.keys["one"]
    now[0] += 3300
    assert identify(checker, signed(key)).uid == POD
    now[0] += 400
    with pytest.raises(BadTokenError):
        identify(checker, signed(key, exp=now[0] + 100))


def test_a_token_of_another_issuer_is_left_to_the_api_server(key: Any) -> None:
    cluster = OpenCluster(one=key)
    with pytest.raises(BadTokenError, match="the token is not valid"):
        identify(TokenChecker(cluster), signed(key, iss="https://elsewhere"))
    assert cluster.num_reviews == 1


# --------------------------------------------------------------------------------------------------- by the API server


def test_a_review_is_asked_for_once_a_minute() -> None:
    now = [time.time()]
    cluster = PretendedCluster()
    checker = TokenChecker(cluster, clock=lambda: now[0])
    token = cluster.make_token()
    for _ in range(5):
        assert identify(checker, token) == PodIdentity(namespace=NAMESPACE, uid=POD)
        now[0] += 11
    assert cluster.num_reviews == 1
    now[0] += 11
    del cluster.tokens[token]  # its pod is gone
    with pytest.raises(BadTokenError):
        identify(checker, token)
    assert cluster.num_reviews == 2


def test_a_review_of_a_token_that_is_no_pods_names_nobody() -> None:
    cluster = PretendedCluster()
    token = cluster.make_token()
    cluster.tokens[token]["sub"] = "system:node:gpu-7"
    with pytest.raises(BadTokenError, match="not that of a pod"):
        identify(TokenChecker(cluster), token)
    token = cluster.make_token()
    del cluster.tokens[token]["kubernetes.io"]["pod"]  # a service account's own
    with pytest.raises(BadTokenError, match="not that of a pod"):
        identify(TokenChecker(cluster), token)


def test_a_review_for_one_run_does_not_serve_another() -> None:
    cluster = PretendedCluster()
    token = cluster.make_token(audience=AUDIENCE)
    checker = TokenChecker(cluster)
    identify(checker, token)
    # A token of two audiences, of which the API server confirms one.
    content = cluster.tokens.pop(token)
    both = (
        f"{encoded({'alg': 'RS256'})}.{encoded(content | {'aud': [AUDIENCE, audience_of('a', 'b')]})}.{encoded(b'x')}"
    )
    cluster.tokens[both] = content
    with pytest.raises(BadTokenError, match=r"not for opensora\.dev/a/b"):
        identify(checker, both, audience=audience_of("a", "b"))


def test_an_api_server_that_is_away_says_nothing_about_a_token() -> None:
    cluster = PretendedCluster()
    token = cluster.make_token()
    checker = TokenChecker(cluster)
    cluster.is_up = False
    with pytest.raises(ConnectionError):
        identify(checker, token)
    cluster.is_up = True
    assert identify(checker, token).uid == POD


def test_guessing_does_not_flood_the_api_server() -> None:
    now = [time.time()]
    cluster = PretendedCluster()
    checker = TokenChecker(cluster, clock=lambda: now[0])
    good = cluster.make_token()
    identify(checker, good)

    def guess(number: int, sender: str) -> None:
        token = f"{encoded({'alg': 'RS256'})}.{encoded(claims())}.{encoded(str(number).encode())}"
        identify(checker, token, sender=sender)

    for number in range(20):
        with pytest.raises(BadTokenError):
            guess(number, "10.6.6.6")
    reviews = cluster.num_reviews
    for number in range(100, 200):
        with pytest.raises(TooManyBadTokensError):
            guess(number, "10.6.6.6")
    assert cluster.num_reviews == reviews
    with pytest.raises(BadTokenError):
        guess(300, "10.7.7.7")
    assert identify(checker, good, sender="10.6.6.6").uid == POD, "a neighbour that is known is still heard"


@pytest.mark.parametrize(
    "token",
    ["", "a", "a.b.c", "....", "é.é.é", f"{encoded([])}.{encoded({})}.", f"{encoded({})}.{encoded(b'[' * 9000)}.x",
     "x" * 9000, f"{encoded({})}.{encoded(7)}.{encoded(b'x')}"],
    ids=["empty", "word", "letters", "dots", "accents", "list", "deep", "long", "number"],
)  # fmt: skip
def test_what_is_no_token_is_refused(token: str) -> None:
    cluster = PretendedCluster()
    with pytest.raises(BadTokenError, match=r"that is no token|too long"):
        identify(TokenChecker(cluster), token)
    assert cluster.num_reviews == 0


def test_the_audience_names_namespace_and_run() -> None:
    assert audience_of("videos", "demo") == "opensora.dev/videos/demo"
    assert json.loads(json.dumps(claims()))["aud"] == [AUDIENCE]
