"""Serves /metrics and /healthz."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web

from opensora_operator.metrics import Metrics

logger = logging.getLogger(__name__)


class HealthServer:
    """An HTTP server. `problem` answers what is wrong, or an empty string."""

    def __init__(self, metrics: Metrics, problem: Callable[[], str]) -> None:
        self._metrics = metrics
        self._problem = problem
        self._runner: web.AppRunner | None = None

    async def start(self, address: str, port: int) -> None:
        """Serve until `stop`. Raises OSError when the port is taken."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/metrics", self._text)
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, address, port)
        await site.start()
        where = ", ".join(f"{host}:{found}" for host, found, *_ in self._runner.addresses)
        logger.info("metrics and health at %s", where)

    async def stop(self) -> None:
        """Close it."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        problem = self._problem()
        return web.Response(text=problem or "ok", status=503 if problem else 200)

    async def _text(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})
