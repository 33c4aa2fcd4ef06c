"""Takes the progress of runs over TLS and answers with what is asked of them. docs/reference/progress.md describes it.

Only a pod of a run's current attempt is heard. The operator never opens a connection to a pod.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import ClientPayloadError, web

from opensora_operator.allowances import Allowances
from opensora_operator.plans import Object
from opensora_operator.progress import (
    MAX_BODY_BYTES,
    BadReportError,
    LiveRun,
    ProgressBook,
    RunDirectory,
    StaleReportError,
    parse_report,
    reply_to,
)
from opensora_operator.tokens import (
    BadTokenError,
    PodIdentity,
    TokenChecker,
    TooManyBadTokensError,
    WrongAudienceError,
    audience_of,
)

logger = logging.getLogger(__name__)

PATH = "/v1/namespaces/{namespace:[-a-z0-9]{1,63}}/runs/{name:[-a-z0-9]{1,63}}/progress"
_BODY_SECONDS = 10.0
_RETRY_SECONDS = 2
"""What a sender is told to wait where the fault is not its own."""
_REPORTS_BURST, _REPORTS_PER_SECOND = 10, 1.0
_WARNINGS_PER_SECOND = 1 / 60


class _RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, error: str, *, retry_seconds: float | None = None) -> None:
        self.status = status
        self.error = error
        self.retry_seconds = retry_seconds


class ProgressServer:
    """Takes reports into the book.

    Args:
        book: where the newest reports are kept.
        directory: where runs are looked up.
        tokens: tells senders.
        is_leader: whether this replica leads; the others take no reports, since they would keep them to themselves.
        on_report: called with namespace and name of a run that has a new report.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        book: ProgressBook,
        directory: RunDirectory,
        tokens: TokenChecker,
        *,
        is_leader: Callable[[], bool],
        on_report: Callable[[str, str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._book = book
        self._directory = directory
        self._tokens = tokens
        self._is_leader = is_leader
        self._on_report = on_report
        self._clock = clock
        self._reports = Allowances(burst=_REPORTS_BURST, per_second=_REPORTS_PER_SECOND, clock=clock)
        self._warnings = Allowances(burst=1, per_second=_WARNINGS_PER_SECOND, clock=clock)
        self._runner: web.AppRunner | None = None

    async def start(self, *, host: str, port: int, tls: ssl.SSLContext) -> int:
        """Listen; returns the port, which 0 leaves to the system."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post(PATH, self._handle)
        self._runner = web.AppRunner(app, access_log=None, auto_decompress=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls)
        await site.start()
        taken: int = self._runner.addresses[0][1]
        logger.info("progress is taken on port %d", taken)
        return taken

    async def stop(self) -> None:
        """Stop listening; messages that are being taken get their answers."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        try:
            response = web.json_response(await self._take(request, namespace, name))
        except _RefusedError as refused:
            self._tell(refused, f"{namespace}/{name}", request.remote)
            headers = {} if refused.retry_seconds is None else {"Retry-After": str(math.ceil(refused.retry_seconds))}
            response = web.json_response({"error": refused.error}, status=refused.status, headers=headers)
        response.force_close()  # the next message is seconds away, and there are thousands of senders
        return response

    def _tell(self, refused: _RefusedError, run: str, address: str | None) -> None:
        is_new = refused.status != HTTPStatus.SERVICE_UNAVAILABLE and self._warnings.take(f"{run} {refused.status}")
        level = logging.WARNING if is_new else logging.DEBUG
        logger.log(level, "progress of %s from %s refused: %s", run, address, refused.error)

    async def _take(self, request: web.Request, namespace: str, name: str) -> Object:
        if not self._is_leader():
            raise _RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE, "this replica does not lead", retry_seconds=_RETRY_SECONDS
            )
        pod = await self._sender(request, namespace, name)
        body = await _read(request)
        run = self._run_of(pod, namespace, name)  # nothing is waited for any more: it stays the current one
        if not self._reports.take(run.uid):
            seconds = self._reports.seconds_left(run.uid)
            raise _RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "this run reports too often", retry_seconds=seconds)
        try:
            report = parse_report(body, pod_uid=pod.uid, received=self._clock())
        except BadReportError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        if report.attempt != run.attempt:
            raise _RefusedError(HTTPStatus.CONFLICT, f"attempt {report.attempt} is not the current one, {run.attempt}")
        try:
            self._book.record(run.uid, report)
        except StaleReportError as error:
            raise _RefusedError(HTTPStatus.CONFLICT, str(error)) from error
        self._on_report(namespace, name)
        return reply_to(report, run)

    async def _sender(self, request: web.Request, namespace: str, name: str) -> PodIdentity:
        """The pod that sends, by its token."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            if scheme.lower() != "bearer" or not token:
                raise BadTokenError("send `Authorization: Bearer TOKEN`")
            return await self._tokens.identify(
                token.strip(), audience=audience_of(namespace, name), sender=request.remote or ""
            )
        except BadTokenError as error:
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, str(error)) from error
        except WrongAudienceError as error:
            raise _RefusedError(HTTPStatus.FORBIDDEN, str(error)) from error
        except TooManyBadTokensError as error:
            raise _RefusedError(HTTPStatus.TOO_MANY_REQUESTS, str(error), retry_seconds=error.seconds) from error
        except ConnectionError as error:
            logger.warning("tokens cannot be checked: %s", error)
            raise _RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE, "the token cannot be checked now", retry_seconds=_RETRY_SECONDS
            ) from error

    def _run_of(self, pod: PodIdentity, namespace: str, name: str) -> LiveRun:
        """The run, if the pod is one of its current attempt. Any pod may have a token made for any audience."""
        run = self._directory.live_run(namespace, name)
        if run is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, f"there is no run {name} in namespace {namespace} that goes on")
        if pod.namespace != namespace or pod.uid not in run.pod_uids:
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, f"the token's pod does not belong to attempt {run.attempt} of {name}"
            )
        return run


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        text = f"the body exceeds {MAX_BODY_BYTES} bytes"
        raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text) from error
    except TimeoutError as error:
        raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, f"the body did not come within {_BODY_SECONDS:g} s") from error
    except (ConnectionError, ClientPayloadError) as error:  # nobody is left to read the answer
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "the sender left before the end of the body") from error
