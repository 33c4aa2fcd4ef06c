"""One thin HTTPS client of the API server: requests, lists and watches of any kind, with errors that people understand.

The official client takes half a second to import, which is more than most commands take as a whole.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlencode, urlsplit

from osctl.certificates import ends_at
from osctl.errors import ApiError, ExitCode, OsctlError, UnreachableError, UsageError
from osctl.kubeconfig import Access

if TYPE_CHECKING:
    from websocket import WebSocket

Object = dict[str, Any]
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
"""Asks for a list as the table that `kubectl get` shows."""
MERGE_PATCH = "application/merge-patch+json"
_JSON = "application/json"
_PAGE = 500
_TRIES = 4
_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 10.0
_PIECE_BYTES = 64 * 1024
RETRIED = (429, 500, 502, 503, 504)
"""HTTP status of a server that is busy or broken for the moment."""


@dataclass(frozen=True)
class Resource:
    """A kind as the API server has it."""

    api_version: str
    plural: str
    kind: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None) -> str:
        """The path of one object, of a namespace's, or of all."""
        root = "/api" if "/" not in self.api_version else "/apis"
        parts = [f"{root}/{self.api_version}"]
        if self.namespaced and namespace:
            parts += ["namespaces", _quoted(namespace)]
        parts.append(self.plural)
        if name is not None:
            parts.append(_quoted(name))
        return "/".join(parts)


PODS = Resource("v1", "pods", "Pod")
EVENTS = Resource("v1", "events", "Event")
CONFIG_MAPS = Resource("v1", "configmaps", "ConfigMap")
SERVICES = Resource("v1", "services", "Service")
NODES = Resource("v1", "nodes", "Node", namespaced=False)
JOBS = Resource("batch/v1", "jobs", "Job")
NETWORK_POLICIES = Resource("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy")
POD_GROUPS = Resource("scheduling.x-k8s.io/v1alpha1", "podgroups", "PodGroup")


class Client:
    """Requests to one API server over one connection, from one thread; a context manager."""

    def __init__(
        self, access: Access, *, timeout_seconds: float = 30.0, renew: Callable[[], Access] | None = None
    ) -> None:
        """`renew` logs in again, where a login can expire while a command goes on."""
        self.num_requests = 0
        self.clock_ahead: float | None = None
        """Seconds that the API server's clock is ahead of ours, by its last answer, which tells whole seconds."""
        self._timeout = timeout_seconds
        self._login = _Login(access, renew)
        self._address = urlsplit(access.server)
        self._connection: http.client.HTTPConnection | None = None

    @property
    def access(self) -> Access:
        """The API server, and who we are to it."""
        return self._login.access

    def another(self) -> Client:
        """The same API server over a connection of its own: for another thread."""
        other = Client(self.access, timeout_seconds=self._timeout)
        other._login = self._login
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the connection; the next request opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def abort(self) -> None:
        """End what another thread is waiting for over this connection."""
        sock = None if self._connection is None else self._connection.sock
        if sock is not None:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS has nothing to say any more

    # Requests

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """One object."""
        return _object(self.request("GET", resource.path(namespace, name)))

    def find(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """One object, or None."""
        try:
            return self.get(resource, namespace, name)
        except ApiError as error:
            if error.reason == "NotFound" and error.status == 404:
                return None
            raise

    def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> list[Object]:
        """All objects, of a namespace or of all."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        return [item for page in self.pages(resource.path(namespace), query) for item in page.get("items") or ()]

    def pages(self, path: str, query: Mapping[str, str], *, accept: str = _JSON) -> Iterator[Object]:
        """A list, page by page."""
        given = {key: value for key, value in query.items() if value}
        token = ""
        while True:
            page = self.request("GET", path, {**given, "limit": str(_PAGE), "continue": token}, accept=accept)
            yield page
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return

    def create(self, resource: Resource, namespace: str | None, body: Object, *, dry_run: bool = False) -> Object:
        """Create an object; unknown fields are refused."""
        query = {"fieldValidation": "Strict", **_dry(dry_run)}
        return _object(self.request("POST", resource.path(namespace), query, body=body))

    def patch(
        self, resource: Resource, namespace: str | None, name: str, change: Object, *, dry_run: bool = False
    ) -> Object:
        """Merge a change into an object."""
        query = {"fieldValidation": "Strict", **_dry(dry_run)}
        path = resource.path(namespace, name)
        return _object(self.request("PATCH", path, query, body=change, content_type=MERGE_PATCH))

    def delete(
        self, resource: Resource, namespace: str | None, name: str, *, uid: str, dry_run: bool = False
    ) -> Object:
        """Delete an object of this UID."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        return _object(self.request("DELETE", resource.path(namespace, name), _dry(dry_run), body=body))

    def watch(
        self, resource: Resource, namespace: str, name: str, *, version: str, seconds: float
    ) -> Iterator[tuple[str, Object]]:
        """Changes of one object since a version: (`ADDED`, `MODIFIED` or `DELETED`, object). Ends when the time is over
        or the API server ends it; raises ApiError with status 410 where the version is too old."""
        query = {
            "watch": "1",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, int(seconds))),
        }
        try:
            for line in _lines(self.stream(resource.path(namespace), query)):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise ApiError(str(status.get("message")), status=int(status.get("code", 500)))
                yield event["type"], event["object"]
        except (UnreachableError, ValueError):
            return  # cut off: whoever watches looks again

    def stream(self, path: str, query: Mapping[str, str], *, quiet_seconds: float | None = None) -> Iterator[bytes]:
        """The answer to a GET, piece by piece as it arrives. Meanwhile nothing else can be asked over this connection.

        Args:
            path: what to get.
            query: parameters.
            quiet_seconds: longest time without a piece; that of any request unless given.

        Raises:
            ApiError: it was refused.
            UnreachableError: the API server cannot be reached, or has cut the answer off.
        """
        target = f"{path}?{urlencode(query)}"
        access = self.access
        answer = self._send("GET", target, None, {"Accept": "*/*"})
        if answer.status == 401 and self._login.renew(access):
            self.close()
            answer = self._send("GET", target, None, {"Accept": "*/*"})
        try:
            if answer.status != 200:
                raise self._refusal(answer.status, answer.read(), "GET", path)
            if quiet_seconds is not None and self._connection is not None and self._connection.sock is not None:
                self._connection.sock.settimeout(quiet_seconds)
            while piece := answer.read1(_PIECE_BYTES):
                yield piece
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            answer.close()
            self.close()

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Any = None,
        accept: str = _JSON,
        content_type: str = _JSON,
    ) -> Any:
        """One request, again where the API server asks to wait or a kept connection has died.

        Raises:
            ApiError: it was refused.
            OsctlError: the API server cannot be reached.
        """
        given = urlencode({key: value for key, value in (query or {}).items() if value})
        target = f"{path}?{given}" if given else path
        payload = None if body is None else json.dumps(body).encode()
        headers = {"Accept": accept} | ({"Content-Type": content_type} if payload is not None else {})
        for attempt in range(_TRIES):
            access = self.access
            answer = self._send(method, target, payload, headers)
            try:
                content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.close()
                raise self._unreachable(error) from error
            if answer.status < 300:
                return _decoded(content, path)
            if answer.status == 401 and attempt == 0 and self._login.renew(access):
                self.close()  # a client certificate belongs to a connection
                continue
            pause = _pause(answer, attempt)
            is_safe = answer.status == 429 or (method == "GET" and answer.status in RETRIED)
            if not is_safe or attempt == _TRIES - 1 or pause is None:
                raise self._refusal(answer.status, content, method, path)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def upgrade(self, path: str, query: Sequence[tuple[str, str]], protocol: str) -> WebSocket:
        """A WebSocket over a connection of its own.

        Raises:
            ApiError: it was refused.
            OsctlError: the API server cannot be reached, or something between does not let WebSockets through.
        """
        import websocket  # only commands that talk to pods need it

        self.num_requests += 1
        connection = self._connect()
        headers = [f"Authorization: Bearer {self.access.token}"] if self.access.token else []
        target = f"{self._address.path}{path}?{urlencode(query)}"
        upgraded = websocket.WebSocket(skip_utf8_validation=True)
        try:
            connection.connect()
            upgraded.connect(
                f"ws://{self._address.netloc}{target}",
                socket=connection.sock,
                header=["User-Agent: osctl", *headers],
                subprotocols=[protocol],
                suppress_origin=True,
            )
        except websocket.WebSocketBadStatusException as error:
            connection.close()
            raise self._refusal(error.status_code, error.resp_body or b"", "GET", path) from error
        except websocket.WebSocketException as error:
            connection.close()
            raise OsctlError(
                f"{self.access.server} does not open a WebSocket: {error}",
                hint="a proxy on the way may not let WebSockets through",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from error
        return upgraded

    # Connection

    def _send(
        self, method: str, target: str, payload: bytes | None, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        headers = {"User-Agent": "osctl", **headers}
        if self.access.token:
            headers["Authorization"] = f"Bearer {self.access.token}"
        was_kept = self._connection is not None
        self.num_requests += 1
        try:
            return self._exchange(method, target, payload, headers)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError) as error:
            self.close()
            if not was_kept or method == "POST":
                raise self._unreachable(error) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._unreachable(error) from error
        try:  # a connection that was kept may have been closed meanwhile: once more over a new one
            return self._exchange(method, target, payload, headers)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._unreachable(error) from error

    def _exchange(
        self, method: str, target: str, payload: bytes | None, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        if self._connection is None:
            self._connection = self._connect()
        if self._connection.sock is None:
            self._connection.connect()
        with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):  # it may have said why before
            self._connection.request(method, self._address.path + target, body=payload, headers=dict(headers))
        answer = self._connection.getresponse()
        self.clock_ahead = _clock_ahead(answer.headers.get("Date"))
        return answer

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address.hostname or "", self._address.port
        is_tls = self._address.scheme == "https"
        proxy = urlsplit(self._proxy(host) or "")
        if proxy.hostname and proxy.scheme != "http":
            raise OsctlError(f"the proxy {proxy.geturl()} is not one of http://", hint="use an HTTP proxy, or none")
        endpoint = (proxy.hostname, proxy.port or 80) if proxy.hostname else (host, port or (443 if is_tls else 80))
        connection: http.client.HTTPConnection
        if is_tls:
            connection = _TlsConnection(
                endpoint, timeout=self._timeout, context=self._login.context(), server_name=self.access.server_name
            )
        else:
            connection = http.client.HTTPConnection(*endpoint, timeout=self._timeout)
        if proxy.hostname:
            connection.set_tunnel(host, port or (443 if is_tls else 80))
        return connection

    def _proxy(self, host: str) -> str | None:
        if self.access.proxy:
            return self.access.proxy
        exceptions = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
        names = [part.strip().lstrip("*").lstrip(".") for part in exceptions.split(",") if part.strip()]
        if "*" in exceptions.split(",") or any(host == name or host.endswith(f".{name}") for name in names if name):
            return None
        if host in ("localhost", "::1") or host.startswith("127."):
            return None
        return os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")

    # Errors

    def _unreachable(self, error: Exception) -> OsctlError:
        server, source = self.access.server, self.access.source
        expired = self._expired()
        if expired is not None and isinstance(error, ssl.SSLError | ConnectionError):
            return expired
        if isinstance(error, ssl.SSLCertVerificationError):
            return OsctlError(
                f"{server} shows a certificate that is not to be trusted: {error.verify_message}",
                hint=f"the authority in {source} is not that of this server: make the kubeconfig anew",
            )
        if isinstance(error, ssl.SSLError) and "ALERT" in str(error).upper():
            return OsctlError(
                f"{server} does not take the client certificate: {error.reason or error}",
                hint="it may have expired: log in again, or make the kubeconfig anew",
                exit_code=ExitCode.NOT_ALLOWED,
            )
        if isinstance(error, TimeoutError | socket.timeout):
            return UnreachableError(
                f"{server} did not answer within {self._timeout:g} s",
                hint="check the network or VPN; --timeout waits longer",
            )
        if isinstance(error, socket.gaierror):
            return UnreachableError(
                f"{server}: there is no host of that name", hint=f"check the network, or the address in {source}"
            )
        return UnreachableError(
            f"{server} cannot be reached: {getattr(error, 'strerror', None) or error}",
            hint=f"check that the cluster runs, and the address in {source}",
        )

    def _expired(self) -> OsctlError | None:
        """Why we are not let in, where our certificate has ended."""
        end = ends_at(self.access.certificate) if self.access.certificate else None
        if end is None or end > time.time():
            return None
        day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(end))
        return OsctlError(
            f"the client certificate in {self.access.source} has expired: it was good until {day}",
            hint="log in again, or make the kubeconfig anew",
            exit_code=ExitCode.NOT_ALLOWED,
        )

    def _refusal(self, status: int, content: bytes, method: str, path: str) -> ApiError:
        answer = _status_of(content)
        message = str(answer.get("message") or content.decode(errors="replace").strip()[:300] or f"HTTP {status}")
        reason = str(answer.get("reason") or "")
        source = self.access.source
        hint: str | None = None
        code = ExitCode.ERROR
        if status == 401:
            expired = self._expired()
            words = f"{self.access.server} does not know you: {message}" if expired is None else expired.message
            message, code = words, ExitCode.NOT_ALLOWED
            hint = f"the login in {source} is wrong or has expired: log in again"
        elif status == 403:
            code, hint = ExitCode.NOT_ALLOWED, "ask whoever runs the cluster for this right"
        elif status == 404 and not answer.get("details", {}).get("name"):
            code, hint = ExitCode.NOT_FOUND, "is the operator installed? `osctl doctor` tells"
            message = f"the cluster does not know {path.split('?')[0]}"
            reason = "UnknownKind"
        elif status == 404:
            code, hint = ExitCode.NOT_FOUND, "`osctl get` lists what there is; -n names another namespace"
        elif status == 409:
            code = ExitCode.CONFLICT
            hint = "choose another name, or delete the other one" if reason == "AlreadyExists" else "try again"
        elif status == 422:
            causes = [
                f"{cause.get('field')}: {cause.get('message')}"
                for cause in (answer.get("details") or {}).get("causes") or ()
            ]
            message = "; ".join(causes) or message
            is_change = method == "PATCH"
            code = ExitCode.CONFLICT if is_change else ExitCode.USAGE
            hint = None if is_change else "`osctl explain FIELD` tells what a field takes"
        elif status == 400:
            code = ExitCode.USAGE
        elif status in RETRIED:
            hint = "the API server is busy or broken; try again later"
        return ApiError(message, status=status, reason=reason, hint=hint, exit_code=code)


class _Login:
    """Who we are to the API server, for all connections to it; made anew when it has expired."""

    def __init__(self, access: Access, renew: Callable[[], Access] | None) -> None:
        self.access = access
        self._renew = renew
        self._lock = threading.Lock()
        self._context: tuple[Access, ssl.SSLContext] | None = None

    def renew(self, refused: Access) -> bool:
        """Whether there is another login than the refused one."""
        with self._lock:
            if self.access is refused and self._renew is not None:
                self.access = self._renew()
            return self.access != refused

    def context(self) -> ssl.SSLContext:
        """The TLS settings of the login. Raises OsctlError."""
        with self._lock:
            if self._context is None or self._context[0] is not self.access:
                self._context = self.access, _tls_context(self.access)
            return self._context[1]


class _TlsConnection(http.client.HTTPSConnection):
    """Checks the certificate against a name of our choice, where there is one."""

    def __init__(
        self, endpoint: tuple[str, int], *, timeout: float, context: ssl.SSLContext, server_name: str | None
    ) -> None:
        super().__init__(*endpoint, timeout=timeout, context=context)
        self._tls = context
        self._server_name = server_name

    def connect(self) -> None:
        """Open the connection."""
        if self._server_name is None:
            super().connect()
            return
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name)


def _tls_context(access: Access) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=access.authority)
        if access.is_insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if access.certificate and access.key:
            _load_certificate(context, access.certificate, access.key)
    except (ssl.SSLError, ValueError) as error:
        raise OsctlError(
            f"{access.source}: a certificate or key cannot be used: {error}", hint="make the kubeconfig anew"
        ) from error
    return context


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Python takes a client certificate from a file alone: it exists for a moment, and nobody else can read it."""
    with tempfile.TemporaryDirectory(prefix="osctl-") as folder:
        path = os.path.join(folder, "client.pem")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(certificate + "\n" + key + "\n")
        context.load_cert_chain(path)


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _quoted(name: str) -> str:
    """A name as a part of a path. Raises UsageError for those that cannot be one."""
    if name in ("", ".", "..") or "/" in name or "%" in name:
        raise UsageError(f"{name!r} is no name", hint="names have lower-case letters, digits and -")
    return quote(name, safe="", errors="replace")


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}


def _object(value: Any) -> Object:
    if not isinstance(value, dict):
        raise OsctlError("the answer is no object", hint="is this address an API server's?")
    return value


def _decoded(content: bytes, path: str) -> Any:
    if not content.startswith((b"{", b"[")):
        return content.decode(errors="replace")
    try:
        return json.loads(content)
    except ValueError as error:
        raise OsctlError(f"the answer to {path} is no JSON", hint="is this address an API server's?") from error


def _status_of(content: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _clock_ahead(date: str | None) -> float | None:
    parts = parsedate_tz(date)
    try:
        return None if parts is None else mktime_tz(parts) - time.time()
    except (ValueError, OverflowError):  # something else than an API server
        return None


def _pause(answer: http.client.HTTPResponse, attempt: int) -> float | None:
    """How long to wait before trying again; None where that is longer than anybody wants to."""
    asked = answer.headers.get("Retry-After") or ""
    pause = float(asked) if asked.isdigit() else _PAUSE_SECONDS * 2**attempt
    return pause if pause <= _MAX_PAUSE_SECONDS else None
