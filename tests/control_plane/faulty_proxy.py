"""A proxy before the API server that fails as networks and busy servers do."""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml
from aiohttp import web
from control_plane import ControlPlane

Fault = Callable[[web.Request], web.Response | None]
"""Answers in the API server's place, or not at all (None)."""


class FaultyProxy(threading.Thread):
    """Speaks plain HTTP to the operator and TLS to the API server. A context manager."""

    def __init__(self, control_plane: ControlPlane) -> None:
        super().__init__(name="faulty-proxy", daemon=True)
        self._control_plane = control_plane
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._streams: set[asyncio.Task[Any]] = set()
        self._refuses = False
        self.fault: Fault = lambda request: None
        """Decides about each request before the API server sees it."""
        self.fault_of_answer: Fault = lambda request: None
        """And about the answer, once the API server has done what was asked."""
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        assert self._ready.wait(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join(10)

    def kubeconfig(self, identity: str) -> Path:
        """A kubeconfig that leads here."""
        config = yaml.safe_load(self._control_plane.kubeconfig(identity).read_text())
        config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{self.port}"}
        path = self._control_plane.folder / f"proxy-{self.port}-{identity}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def cut(self) -> None:
        """Cut all connections in the middle of what they carry."""

        async def cancel() -> None:
            for task in list(self._streams):
                task.cancel()

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(10)

    def refuse(self, refuses: bool = True) -> None:
        """Cut all connections and let none through, until told otherwise."""
        self._refuses = refuses
        self.cut()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._begin())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _begin(self) -> None:
        tls = ssl.create_default_context(cafile=str(self._control_plane.ca_file))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=0, force_close=True), auto_decompress=False
        )
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _end(self) -> None:
        streams = list(self._streams)
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await self._runner.cleanup()
        await self._session.close()
        await asyncio.sleep(0.3)  # aiohttp does not wait for the ends of TLS connections

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self._refuses:
            assert request.transport is not None
            request.transport.abort()
            raise asyncio.CancelledError
        answer = self.fault(request)
        if answer is not None:
            return answer
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            return await self._forward(request)
        except asyncio.CancelledError:
            if request.transport is not None:
                request.transport.abort()
            raise
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=str(error))
        finally:
            self._streams.discard(task)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        url = f"{self._control_plane.url}{request.rel_url.raw_path_qs}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with self._session.request(
            request.method, url, headers=headers, data=await request.read() or None, timeout=timeout
        ) as answer:
            lost = self.fault_of_answer(request)
            if lost is not None:
                return lost
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


def storm(share: float, *, seed: int = 0) -> Fault:
    """Answers this share of all requests but those for the Lease with 429, 500 or 503."""
    dice = random.Random(seed)

    def fault(request: web.Request) -> web.Response | None:
        if "/leases/" in request.path or dice.random() >= share:
            return None
        code = dice.choice((429, 500, 503))
        headers = {"Retry-After": "1"} if code == 429 else {}
        return web.json_response({"kind": "Status", "code": code, "message": "a storm"}, status=code, headers=headers)

    return fault
