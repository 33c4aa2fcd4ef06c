"""The WebSocket endpoints of a pod, as the API server serves them, with programs of this test behind them."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import WSMsgType, web
from fake_api import FakeApi, Request, refusal

STDIN, STDOUT, STDERR, STATUS, SIZE, CLOSE = 0, 1, 2, 3, 4, 255


@dataclass
class FakeKubelet:
    """Serves `exec` and `portforward` of any pod in a thread of its own. A context manager."""

    asked: list[tuple[str, list[tuple[str, str]], dict[str, str]]] = field(default_factory=list)
    """Path, parameters and headers of each request."""
    sizes: list[dict[str, int]] = field(default_factory=list)
    refusal: tuple[int, dict[str, Any]] | None = None
    gone: set[str] = field(default_factory=set)
    """Pods that are no more."""
    objects: FakeApi = field(default_factory=FakeApi)
    """Answers everything else."""
    port: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._run())

    async def _run(self) -> None:
        self._stopping = asyncio.Event()
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/{namespace}/pods/{pod}/exec", self._exec)
        app.router.add_get("/api/v1/namespaces/{namespace}/pods/{pod}/portforward", self._forward)
        app.router.add_route("*", "/{rest:.*}", self._plain)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stopping.wait()
        await runner.cleanup()

    async def _plain(self, request: web.Request) -> web.Response:
        text = await request.text()
        asked = Request(request.method, request.path, request.query_string, json.loads(text) if text else None, {})
        self.objects.requests.append(asked)
        status, answer = self.objects.answer(asked)
        return web.json_response(answer, status=status)

    async def _open(self, request: web.Request, protocol: str) -> web.WebSocketResponse:
        self.asked.append((request.path, list(request.query.items()), dict(request.headers)))
        refused = self.refusal
        if request.match_info["pod"] in self.gone:
            refused = refusal(404, "NotFound", "pods not found", name=request.match_info["pod"])
        if refused is not None:
            raise _refused(*refused)
        socket = web.WebSocketResponse(protocols=[protocol], max_msg_size=0)
        await socket.prepare(request)
        return socket

    async def _exec(self, request: web.Request) -> web.WebSocketResponse:
        """Programs: `echo WORDS`, `fail CODE`, `cat`, `sizes` (of the terminal, until input ends), `vanish`, `none`."""
        socket = await self._open(request, "v5.channel.k8s.io")
        program, *words = request.query.getall("command")
        status: dict[str, Any] = {"status": "Success"}
        if program == "echo":
            await socket.ping(b"are you there")
            await socket.send_bytes(bytes([STDOUT]) + " ".join(words).encode() + b"\n")
            await socket.send_bytes(bytes([STDERR]) + b"and a complaint\n")
        elif program == "fail":
            causes = [{"reason": "ExitCode", "message": words[0]}]
            status = {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}
        elif program == "none":
            status = {"status": "Failure", "reason": "InternalError", "message": "exec: none: not found in $PATH"}
        elif program == "vanish":
            await socket.close()
            return socket
        else:
            await self._answer_input(socket)
        await socket.send_bytes(bytes([STATUS]) + json.dumps(status).encode())
        await socket.close()
        return socket

    async def _answer_input(self, socket: web.WebSocketResponse) -> None:
        async for message in socket:
            if message.type is not WSMsgType.BINARY or not message.data:
                continue
            channel, data = message.data[0], message.data[1:]
            if channel == STDIN:
                await socket.send_bytes(bytes([STDOUT]) + data)
            elif channel == SIZE:
                self.sizes.append(json.loads(data))
            elif channel == CLOSE and data == bytes([STDIN]):
                return

    async def _forward(self, request: web.Request) -> web.WebSocketResponse:
        """Port 7 sends back what it is sent; port 13 says one word and hangs up; nothing listens at others."""
        socket = await self._open(request, "v4.channel.k8s.io")
        port = int(request.query["ports"])
        for channel in (0, 1):
            await socket.send_bytes(bytes([channel]) + port.to_bytes(2, "little"))
        if port == 13:
            await socket.send_bytes(b"\0hello")
        elif port == 7:
            async for message in socket:
                if message.type is WSMsgType.BINARY:
                    await socket.send_bytes(message.data)
        else:
            await socket.send_bytes(b"\1" + f"dial tcp4 127.0.0.1:{port}: connection refused".encode())
        await socket.close()
        return socket


def _refused(status: int, body: dict[str, Any]) -> web.HTTPException:
    class Refused(web.HTTPException):
        status_code = status

    return Refused(text=json.dumps(body), content_type="application/json")
