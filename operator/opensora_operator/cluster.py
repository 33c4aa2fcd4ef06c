"""The only module that calls the Kubernetes API.

It uses the transport and the configuration loader of the official client's asyncio flavour, and objects as dicts: the
typed models would take 130 MiB. No request is tried again here, except after a new login: who asks knows best when to
ask again, and a queue with growing waits is behind most of them. All requests share one rate limit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from opensora_operator.constants import API_VERSION, MANAGER
from opensora_operator.pacing import RateLimit
from opensora_operator.plans import Object

logger = logging.getLogger(__name__)

_PAGE = 500
_WATCH_SECONDS = 300
"""The server ends a watch after this time, and it is taken up again: so no watch is for ever on one API server."""
_SILENCE_SECONDS = 90.0
"""Bookmarks come every minute: a watch that is silent for longer than this is dead."""
_REQUEST_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
_ACCEPT = "application/json, application/jwk-set+json"
"""The second is the only form in which the cluster's public keys are served."""
_LOGIN_SECONDS = 10.0
"""A token that is refused is not renewed more often than this."""


class ApiError(Exception):
    """The API server refused a request, or could not be reached (code 0)."""

    def __init__(self, code: int, message: str, *, reason: str = "", retry_seconds: float = 0.0) -> None:
        super().__init__(f"{code} {reason}: {message}" if code else message)
        self.code = code
        self.reason = reason
        """In one word: a name that is taken (`AlreadyExists`) and a version that is old (`Conflict`) are both 409."""
        self.message = message
        """In the API server's words."""
        self.retry_seconds = retry_seconds
        """How long it asked us to wait."""


class LoginError(Exception):
    """There is no way to reach an API server from here."""


@dataclass(frozen=True)
class Resource:
    """How objects of a kind are addressed."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Of one object; of all in a namespace without a name; of all in the cluster without a namespace."""
        parts = ["apis" if "/" in self.api_version else "api", self.api_version]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        parts += [self.plural, *(quote(part, safe="") for part in (name, subresource) if part is not None)]
        return "/" + "/".join(parts)


_LEASES = "leases"

RESOURCES: tuple[Resource, ...] = (
    Resource(API_VERSION, "TrainingRun", "trainingruns"),
    Resource(API_VERSION, "SampleJob", "samplejobs"),
    Resource(API_VERSION, "BatchSearch", "batchsearches"),
    Resource(API_VERSION, "TrainingProfile", "trainingprofiles"),
    Resource(API_VERSION, "ClusterTrainingProfile", "clustertrainingprofiles", namespaced=False),
    Resource("batch/v1", "Job", "jobs"),
    Resource("v1", "Pod", "pods"),
    Resource("v1", "Service", "services"),
    Resource("v1", "ConfigMap", "configmaps"),
    Resource("v1", "Secret", "secrets"),
    Resource("v1", "Node", "nodes", namespaced=False),
    Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Resource("events.k8s.io/v1", "Event", "events"),
    Resource("coordination.k8s.io/v1", "Lease", _LEASES),
    Resource("authentication.k8s.io/v1", "TokenReview", "tokenreviews", namespaced=False),
    Resource("scheduling.x-k8s.io/v1alpha1", "PodGroup", "podgroups"),
)


def resource_of(kind: str) -> Resource:
    """The resource of a kind."""
    return next(found for found in RESOURCES if found.kind == kind)


class RequestCounter(Protocol):
    """Who counts requests."""

    def count_request(self, *, verb: str, resource: str, code: int) -> None:
        """A request was answered; code 0: it was not."""


@dataclass(frozen=True)
class WatchEvent:
    """Something happened to an object, or (`BOOKMARK`) nothing until a version."""

    type: str
    object: Object


class Cluster:
    """An API server, as one identity."""

    def __init__(self, *, kubeconfig: str = "", limit: RateLimit, counter: RequestCounter) -> None:
        self._kubeconfig = kubeconfig
        self._limit = limit
        self._counter = counter
        self._rest: RESTClientObject | None = None
        self._login_time = 0.0
        self.configuration = Configuration()
        """How the API server is reached; filled in by `open`."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Log in: service account, kubeconfig with certificates, tokens or exec plugins. Raises LoginError."""
        self.configuration = await load_configuration(self._kubeconfig)
        old, self._rest = self._rest, RESTClientObject(self.configuration)
        self._login_time = time.monotonic()
        if old is not None:
            await old.close()

    async def close(self) -> None:
        """Close all connections."""
        if self._rest is not None:
            await self._rest.close()

    async def get(self, kind: str, namespace: str | None, name: str) -> Object:
        """One object. Raises ApiError, with code 404 where there is none."""
        return await self._call("get", resource_of(kind), namespace, name)

    async def find(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """One object, or None where there is none."""
        try:
            return await self.get(kind, namespace, name)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def list_pages(
        self, kind: str, namespace: str | None = None, *, labels: str = ""
    ) -> AsyncIterator[tuple[list[Object], int]]:
        """All objects of a kind, a few hundred at a time, each page with the version that the list is of."""
        resource = resource_of(kind)
        query = {"limit": str(_PAGE), **({"labelSelector": labels} if labels else {})}
        while True:
            answer = await self._call("list", resource, namespace, query=query)
            items = answer["items"]
            for item in items:  # lists leave them out
                item.setdefault("kind", kind)
                item.setdefault("apiVersion", resource.api_version)
            yield items, int(answer["metadata"]["resourceVersion"])
            following = answer["metadata"].get("continue")
            if not following:
                return
            query["continue"] = following

    async def watch(
        self, kind: str, namespace: str | None = None, *, version: str, labels: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """What happens after a version, until the server ends it. Raises ApiError; code 410: list again."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(int(_WATCH_SECONDS * (0.8 + 0.2 * random.random()))),
            **({"labelSelector": labels} if labels else {}),
        }
        timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        resource = resource_of(kind)
        path = resource.path(namespace)
        async with self._request("watch", resource.plural, path, query=query, timeout=timeout) as response:
            try:
                async for line in response.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _refusal(event["object"], event["object"].get("code", 500), {})
                    yield WatchEvent(event["type"], event["object"])
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # cut in the middle, maybe of a line
                raise ApiError(0, f"the watch of {kind} was cut: {error!r}") from error

    async def create(self, manifest: Object, *, subresource: str | None = None, later: bool = False) -> Object:
        """Create an object. Raises ApiError, with code 409 where its name is taken."""
        resource = resource_of(manifest["kind"])
        namespace = manifest["metadata"].get("namespace")
        return await self._write("create", resource, namespace, body=manifest, subresource=subresource, later=later)

    async def update(self, manifest: Object) -> Object:
        """Replace an object if it still has this `resourceVersion`. Raises ApiError, with code 409 where it has not."""
        resource = resource_of(manifest["kind"])
        metadata = manifest["metadata"]
        return await self._write("update", resource, metadata.get("namespace"), metadata["name"], body=manifest)

    async def patch(
        self,
        kind: str,
        namespace: str | None,
        name: str,
        body: Object,
        *,
        subresource: str | None = None,
        strategic: bool = False,
        later: bool = False,
    ) -> Object:
        """Merge a change into an object. A UID or version in its metadata is a condition: 409 where it is another."""
        return await self._write(
            "patch",
            resource_of(kind),
            namespace,
            name,
            body=body,
            subresource=subresource,
            content=f"application/{'strategic-' if strategic else ''}merge-patch+json",
            later=later,
        )

    async def delete(
        self, kind: str, namespace: str | None, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> Object:
        """Delete an object of this UID and, in the background, what it owns. Raises ApiError: 404, 409 (other UID)."""
        options: Object = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return await self._write("delete", resource_of(kind), namespace, name, body=options)

    async def serves(self, api_version: str) -> frozenset[str]:
        """The kinds that the server has in a group; empty where it has no such group."""
        try:
            answer = await self._answer("get", "discovery", f"/apis/{api_version}")
        except ApiError as error:
            if error.code == 404:
                return frozenset()
            raise
        return frozenset(found["kind"] for found in answer["resources"])

    async def read(self, path: str) -> Object:
        """What the server has at a path that belongs to no kind. Raises ApiError."""
        return await self._answer("get", "public", path)

    async def _write(self, verb: str, resource: Resource, *arguments: Any, **options: Any) -> Object:
        """The one place through which all writes go."""
        return await self._call(verb, resource, *arguments, **options)

    async def _call(
        self,
        verb: str,
        resource: Resource,
        namespace: str | None,
        name: str | None = None,
        *,
        subresource: str | None = None,
        **options: Any,
    ) -> Object:
        what = resource.plural if subresource is None else f"{resource.plural}/{subresource}"
        return await self._answer(verb, what, resource.path(namespace, name, subresource), **options)

    async def _answer(self, verb: str, what: str, path: str, **options: Any) -> Object:
        timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS, sock_connect=_CONNECT_SECONDS)
        async with self._request(verb, what, path, timeout=timeout, **options) as response:
            try:
                answer: Object = json.loads(await response.read())
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise ApiError(0, f"the answer to {verb} {what} was cut: {error!r}") from error
        return answer

    @contextlib.asynccontextmanager
    async def _request(
        self,
        verb: str,
        what: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = "application/json",
        timeout: aiohttp.ClientTimeout | None = None,
        later: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and raise ApiError unless it succeeds."""
        if what != _LEASES:  # a leader that has much to do stays the leader
            await self._limit.acquire(later=later)
        if verb in ("create", "update", "patch"):
            query = {**(query or {}), "fieldManager": MANAGER}
        code = 0
        try:
            response = await self._send(_METHODS[verb], path, query, body, content, timeout)
            if response.status == 401 and await self._log_in_again():
                response.release()
                response = await self._send(_METHODS[verb], path, query, body, content, timeout)
            code = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, f"{verb} {what} at {self.configuration.host}: {error!r}") from error
        finally:
            self._counter.count_request(verb=verb, resource=what, code=code)
        async with response:
            if code >= 400:
                refusal = _refusal(await _read_refusal(response), code, response.headers)
                if code == 429:
                    self._limit.pause(refusal.retry_seconds)
                raise refusal
            yield response

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        content: str,
        timeout: aiohttp.ClientTimeout | None,
    ) -> aiohttp.ClientResponse:
        assert self._rest is not None, "the cluster is not open"
        headers = {"User-Agent": MANAGER, "Accept": _ACCEPT, "Content-Type": content}
        token = await self.configuration.get_api_key_with_prefix("BearerToken")  # a service account's is read again
        if token:
            headers["Authorization"] = token
        url = f"{self.configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        answer = await self._rest.request(  # type: ignore[no-untyped-call]  # the client's
            method, url, headers=headers, body=body, _request_timeout=timeout
        )
        response: aiohttp.ClientResponse = answer.response
        return response

    async def _log_in_again(self) -> bool:
        """Renew what was refused: exec plugins and files may have something newer. False when it is new already."""
        if time.monotonic() - self._login_time < _LOGIN_SECONDS:
            return False
        logger.warning("the API server refused our credentials: logging in again")
        await self.open()
        return True


async def load_configuration(kubeconfig: str) -> Configuration:
    """Where the API server is and who we are. Raises LoginError."""
    configuration = Configuration()
    # Proxies come from the kubeconfig alone, as with kopf: a look into the environment costs a thread a request.
    configuration.client_session_kwargs = {"trust_env": False}
    default = Path(os.environ.get("KUBECONFIG", "") or Path.home() / ".kube" / "config")
    try:
        if not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # the client's
        else:
            await load_kube_config(  # type: ignore[no-untyped-call]  # the client's
                config_file=kubeconfig or str(default), client_configuration=configuration, persist_config=False
            )
    except (ConfigException, OSError) as error:
        raise LoginError(
            f"neither a service account nor a usable kubeconfig ({kubeconfig or default}): {error}"
        ) from error
    return configuration


_METHODS = {
    "get": "GET",
    "list": "GET",
    "watch": "GET",
    "create": "POST",
    "update": "PUT",
    "patch": "PATCH",
    "delete": "DELETE",
}


async def _read_refusal(response: aiohttp.ClientResponse) -> Object:
    """The API server's Status object, or what a proxy before it said in its place."""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        text = await response.text(errors="replace")
        with contextlib.suppress(ValueError):
            answer = json.loads(text)
            if isinstance(answer, dict):
                return answer
        return {"message": text[:512].strip()}
    return {}


def _refusal(status: Object, code: int, headers: Mapping[str, str]) -> ApiError:
    wait = headers.get("Retry-After") or (status.get("details") or {}).get("retryAfterSeconds")
    seconds = float(wait) if wait is not None and str(wait).isdigit() else (1.0 if code == 429 else 0.0)
    return ApiError(code, status.get("message") or "", reason=status.get("reason") or "", retry_seconds=seconds)
