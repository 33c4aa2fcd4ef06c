"""What is sent to an API server and what is made of its answers; the server is a small one in this process."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import kopf
import pytest
import yaml
from aiohttp import web
from opensora_operator.cluster import RESOURCES, ApiError, Cluster, LoginError, load_configuration, resource_of
from opensora_operator.handlers import Forever, connection, make_settings
from opensora_operator.metrics import Metrics
from opensora_operator.pacing import RateLimit
from opensora_operator.plans import Object

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Keeps what it was asked, and answers with what the test says."""

    def __init__(self, handler: Handler) -> None:
        self.requests: list[tuple[str, str, Object, str]] = []
        """Method, path with query, body, authorization."""
        self._handler = handler

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        token = request.headers.get("Authorization", "")
        self.requests.append((request.method, request.path_qs, json.loads(text) if text else {}, token))
        return await self._handler(request)


@asynccontextmanager
async def serving(handler: Handler, folder: Path, **user: Any) -> AsyncIterator[tuple[Server, Cluster]]:
    """A server, and a cluster that speaks to it as this user of a kubeconfig."""
    server = Server(handler)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    path = folder / "kubeconfig"
    path.write_text(kubeconfig(f"http://127.0.0.1:{runner.addresses[0][1]}", **user))
    limit = RateLimit(per_second=1000, burst=1000)
    async with Cluster(kubeconfig=str(path), limit=limit, counter=Metrics()) as cluster:
        yield server, cluster
    await runner.cleanup()


def kubeconfig(server: str, *, cluster: Object | None = None, **user: Any) -> str:
    return yaml.safe_dump(
        {
            "clusters": [{"name": "c", "cluster": {"server": server} | (cluster or {})}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
    )


def answer(body: Object, status: int = 200, **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response(
            body, status=status, headers={name.replace("_", "-"): v for name, v in headers.items()}
        )

    return handler


@pytest.mark.parametrize(
    ("kind", "namespace", "name", "subresource", "path"),
    [
        ("Pod", "team", "p", "status", "/api/v1/namespaces/team/pods/p/status"),
        ("Pod", None, None, None, "/api/v1/pods"),
        ("Node", None, "n", None, "/api/v1/nodes/n"),
        ("ClusterTrainingProfile", "ignored", "h", None, "/apis/opensora.dev/v1alpha1/clustertrainingprofiles/h"),
        ("TrainingRun", "team", "../x", None, "/apis/opensora.dev/v1alpha1/namespaces/team/trainingruns/..%2Fx"),
    ],
)
def test_objects_are_where_the_api_has_them(
    kind: str, namespace: str | None, name: str | None, subresource: str | None, path: str
) -> None:
    assert resource_of(kind).path(namespace, name, subresource) == path


def test_no_two_resources_have_a_kind_of_the_same_name() -> None:
    assert len({resource.kind for resource in RESOURCES}) == len(RESOURCES)


def test_a_write_says_who_and_how(tmp_path: Path) -> None:
    async def scenario() -> list[tuple[str, str, Object, str]]:
        async with serving(answer({"kind": "Job"}), tmp_path, token="secret") as (server, cluster):
            await cluster.create(
                {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"namespace": "team", "name": "j"}}
            )
            await cluster.patch("Job", "team", "j", {"spec": {"suspend": True}})
            await cluster.delete("Pod", "team", "p", uid="u1", grace_seconds=0)
            return server.requests

    create, patch, delete = asyncio.run(scenario())
    assert create[:2] == ("POST", "/apis/batch/v1/namespaces/team/jobs?fieldManager=opensora-operator")
    assert create[3] == "Bearer secret"
    assert patch[1:3] == (
        "/apis/batch/v1/namespaces/team/jobs/j?fieldManager=opensora-operator",
        {"spec": {"suspend": True}},
    )
    assert delete[2]["preconditions"] == {"uid": "u1"}
    assert (delete[2]["gracePeriodSeconds"], delete[2]["propagationPolicy"]) == (0, "Background")


def test_a_refusal_has_code_reason_and_the_servers_words(tmp_path: Path) -> None:
    async def scenario() -> ApiError:
        status = {"kind": "Status", "reason": "AlreadyExists", "message": 'jobs.batch "j" already exists'}
        async with serving(answer(status, 409), tmp_path) as (_, cluster):
            with pytest.raises(ApiError) as refused:
                await cluster.get("Job", "team", "j")
            return refused.value

    error = asyncio.run(scenario())
    assert (error.code, error.reason, error.message) == (409, "AlreadyExists", 'jobs.batch "j" already exists')


def test_an_answer_of_a_proxy_is_an_error_like_any_other(tmp_path: Path) -> None:
    async def bad_gateway(request: web.Request) -> web.StreamResponse:
        return web.Response(status=502, text="<html>bad gateway</html>")

    async def scenario() -> str:
        async with serving(bad_gateway, tmp_path) as (_, cluster):
            with pytest.raises(ApiError) as refused:
                await cluster.find("Job", "team", "j")
            return f"{refused.value.code} {refused.value.message}"

    assert asyncio.run(scenario()) == "502 <html>bad gateway</html>"


def test_what_is_not_there_is_none_only_where_it_was_asked_for_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(answer({"message": "not found"}, 404), tmp_path) as (_, cluster):
            assert await cluster.find("Job", "team", "j") is None
            assert await cluster.serves("opensora.dev/v1alpha1") == frozenset()
            with pytest.raises(ApiError):
                await cluster.get("Job", "team", "j")

    asyncio.run(scenario())


def test_a_busy_server_says_how_long_to_wait_and_all_wait(tmp_path: Path) -> None:
    async def scenario() -> tuple[float, bool]:
        async with serving(answer({"message": "busy"}, 429, retry_after="7"), tmp_path) as (_, cluster):
            with pytest.raises(ApiError) as refused:
                await cluster.get("Job", "team", "j")
            next_one = asyncio.create_task(cluster.find("Job", "team", "j"))
            for _ in range(10):
                await asyncio.sleep(0)
            waits = not next_one.done()
            next_one.cancel()
            return refused.value.retry_seconds, waits

    assert asyncio.run(scenario()) == (7, True)


def test_a_server_that_is_not_there_has_code_0(tmp_path: Path) -> None:
    async def scenario() -> int:
        (tmp_path / "kubeconfig").write_text(kubeconfig("http://127.0.0.1:1"))
        limit = RateLimit(per_second=10, burst=10)
        async with Cluster(kubeconfig=str(tmp_path / "kubeconfig"), limit=limit, counter=Metrics()) as cluster:
            with pytest.raises(ApiError, match="get jobs at http") as refused:
                await cluster.get("Job", "team", "j")
            return refused.value.code

    assert asyncio.run(scenario()) == 0


def test_a_refused_token_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in a file, or of an exec plugin, is renewed by somebody else."""
    monkeypatch.setattr("opensora_operator.cluster._LOGIN_SECONDS", 0.0)
    token_file = tmp_path / "token"
    token_file.write_text("old")

    async def check(request: web.Request) -> web.StreamResponse:
        good = request.headers["Authorization"] == "Bearer new"
        return web.json_response({"message": "" if good else "who are you?"}, status=200 if good else 401)

    async def scenario() -> list[str]:
        async with serving(check, tmp_path, tokenFile=str(token_file)) as (server, cluster):
            token_file.write_text("new")
            await cluster.get("Job", "team", "j")
            return [request[3] for request in server.requests]

    assert asyncio.run(scenario()) == ["Bearer old", "Bearer new"]


def test_a_token_that_stays_refused_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> int:
        async with serving(answer({"message": "who are you?"}, 401), tmp_path, token="x") as (server, cluster):
            with pytest.raises(ApiError) as refused:
                await cluster.get("Job", "team", "j")
            assert len(server.requests) == 1, "it is fresh: a new login would give the same"
            return refused.value.code

    assert asyncio.run(scenario()) == 401


def test_an_exec_plugin_gives_the_token(tmp_path: Path) -> None:
    made = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": "made"},
    }
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "sh",
        "args": ["-c", f"echo '{json.dumps(made)}'"],
        "interactiveMode": "Never",
    }

    async def scenario() -> str:
        async with serving(answer({}), tmp_path, exec=plugin) as (server, cluster):
            await cluster.get("Job", "team", "j")
            return server.requests[0][3]

    assert asyncio.run(scenario()) == "Bearer made"


def test_long_lists_come_in_pages_of_one_version(tmp_path: Path) -> None:
    async def pages(request: web.Request) -> web.StreamResponse:
        is_first = "continue" not in request.query
        metadata = {"resourceVersion": "77"} | ({"continue": "more"} if is_first else {})
        name = "a" if is_first else "b"
        return web.json_response({"metadata": metadata, "items": [{"metadata": {"name": name}}]})

    async def scenario() -> list[tuple[Any, int]]:
        async with serving(pages, tmp_path) as (server, cluster):
            found = [(items[0], version) async for items, version in cluster.list_pages("Job", "team", labels="a,b=c")]
            assert all("labelSelector=a,b%3Dc" in request[1] for request in server.requests)
            return found

    first, second = asyncio.run(scenario())
    assert first == ({"metadata": {"name": "a"}, "kind": "Job", "apiVersion": "batch/v1"}, 77)
    assert second[1] == 77


def _stream(*lines: bytes) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            await response.write(line)
        return response

    return handler


def _watch(handler: Handler, folder: Path) -> tuple[list[str], ApiError | None]:
    """The types of the events, and how the watch ended."""

    async def scenario() -> tuple[list[str], ApiError | None]:
        seen: list[str] = []
        async with serving(handler, folder) as (server, cluster):
            try:
                async for event in cluster.watch("Pod", "team", version="5", labels="x"):
                    seen.append(event.type)
            except ApiError as error:
                return seen, error
            assert "resourceVersion=5" in server.requests[0][1]
            assert "allowWatchBookmarks=true" in server.requests[0][1]
        return seen, None

    return asyncio.run(scenario())


def test_a_watch_tells_of_events_until_the_server_ends_it(tmp_path: Path) -> None:
    big = json.dumps({"type": "MODIFIED", "object": {"data": "x" * 1_000_000}}).encode() + b"\n"
    lines = (b'{"type": "ADDED", "object": {}}\n{"type": "BOOK', b'MARK", "object": {}}\n', big)
    assert _watch(_stream(*lines), tmp_path) == (["ADDED", "BOOKMARK", "MODIFIED"], None)


def test_a_history_that_is_gone_is_told(tmp_path: Path) -> None:
    error = b'{"type": "ERROR", "object": {"code": 410, "message": "too old resource version"}}\n'
    seen, ended = _watch(_stream(b'{"type": "ADDED", "object": {}}\n', error), tmp_path)
    assert seen == ["ADDED"]
    assert ended is not None
    assert ended.code == 410


def test_a_watch_that_is_cut_within_a_line_is_an_error(tmp_path: Path) -> None:
    seen, ended = _watch(_stream(b'{"type": "ADDED", "object": {}}\n{"type": "ADD'), tmp_path)
    assert seen == ["ADDED"]
    assert ended is not None
    assert ended.code == 0


# ------------------------------------------------------------------------------------------------------ kopf's side


def test_kopf_logs_in_as_the_cluster_does(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    pem = base64.b64encode(b"a certificate").decode()
    user = {"client-certificate-data": pem, "client-key-data": pem}
    path.write_text(kubeconfig("https://api:6443", cluster={"certificate-authority-data": pem}, **user))
    info = asyncio.run(connection(str(path)))
    assert info.server == "https://api:6443"
    assert info.token is None
    for file in (info.ca_path, info.certificate_path, info.private_key_path):
        assert Path(str(file)).read_bytes() == b"a certificate"


def test_kopf_gets_the_token_without_its_scheme(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(kubeconfig("https://api:6443", cluster={"insecure-skip-tls-verify": True}, token="secret"))
    info = asyncio.run(connection(str(path)))
    assert (info.scheme, info.token, info.insecure) == ("Bearer", "secret", True)


def test_what_kopf_cannot_do_is_refused_aloud(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(kubeconfig("https://api:6443", cluster={"tls-server-name": "other"}))
    with pytest.raises(kopf.LoginError, match="tls-server-name"):
        asyncio.run(connection(str(path)))


def test_kopf_writes_nothing_and_never_gives_up_a_watch() -> None:
    settings = make_settings()
    assert not settings.posting.enabled
    assert settings.scanning.disabled
    assert settings.peering.standalone
    assert settings.persistence.diffbase_storage.build(body=None) == {}  # type: ignore[arg-type]  # it does not look
    waits = iter(Forever())
    assert [next(waits) for _ in range(100)][-1] == 10


def test_there_is_no_cluster_without_a_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(LoginError, match="nowhere"):
        asyncio.run(load_configuration(""))
