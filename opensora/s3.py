"""Objects in an S3-compatible store, for `opensora.storage`; nothing else imports this.

Built on s3fs, of which it uses the session and the event loop, and none of the caches and retries: those of s3fs and
botocore are switched off, so that one deadline rules. Each request is retried on its own, so an outage in the middle of
a large transfer costs the parts that were under way and nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar
from uuid import uuid4

import aiobotocore.session
import aiohttp
import botocore.config
import botocore.exceptions as boto
import botocore.session
import s3fs
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync

from opensora.config.train import StorageConfig
from opensora.errors import ObjectNotFoundError, StorageAccessError, StorageError, StorageUnavailableError
from opensora.storage import Entry, Piece, changed_error

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

PART_BYTES = 8 * 1024 * 1024
"""Objects above this are moved in parts. S3 wants parts of at least 5 MiB; small ones lose little in an outage."""
_MAX_PARTS = 10_000
_NUM_STREAMS = 8
_SLOWEST_BYTES_PER_SECOND = 128 * 1024
"""A request that is slower counts as stuck. aiohttp has no timeout of its own for a peer that stops reading."""
_READ_BYTES = 256 * 1024
"""What a body is read by: joining the pieces of a whole part costs more than receiving them."""
_FIRST_DELAY_SECONDS = 0.2
_LONGEST_DELAY_SECONDS = 5.0
_DELETES_PER_REQUEST = 1000
_TOKEN_NAME = "opensora-writer"

_TRANSIENT_CODES = frozenset({
    "BadDigest", "ConditionalRequestConflict", "InternalError", "OperationAborted", "RequestLimitExceeded",
    "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests",
    "XAmzContentSHA256Mismatch",
})  # fmt: skip
_ACCESS_CODES = frozenset({
    "AccessDenied", "AccountProblem", "AllAccessDisabled", "AuthorizationHeaderMalformed", "ExpiredToken",
    "InvalidAccessKeyId", "InvalidBucketName", "InvalidSecurity", "InvalidToken", "NoSuchBucket", "NotSignedUp",
    "PermanentRedirect", "RequestTimeTooSkewed", "SignatureDoesNotMatch",
})  # fmt: skip
_CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.TokenRetrievalError,
)
_CONNECTION_ERRORS = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,  # throttling proxies answer with pages that are not XML
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)


class TransientError(Exception):
    """A request failed in a way that may pass. `answered`: something at the endpoint did speak HTTP."""

    def __init__(self, reason: str, *, answered: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.answered = answered


class PreconditionError(Exception):
    """The object is not, or no longer, what the request demanded (HTTP 412)."""


class RangeError(Exception):
    """The range begins behind the end of the object (HTTP 416)."""


class LostUploadError(Exception):
    """The store does not know this multipart upload (any more)."""


class Patience:
    """Retries requests to one store, and reports an outage once, however many threads are in it."""

    def __init__(
        self, store: str, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.was_reached = False
        """Whether anything ever answered at the endpoint."""
        self._store, self._clock, self._sleep = store, clock, sleep
        self._random = random.Random()  # the global one belongs to the training
        self._lock = threading.Lock()
        self._num_failing = 0
        self._reported_since: float | None = None

    def run(self, request: Callable[[], _T], *, deadline_seconds: float) -> _T:
        """The result of `request`, called again after each TransientError until it has failed for the whole deadline.

        Raises StorageUnavailableError then, or StorageAccessError if the endpoint has never answered to anybody.
        """
        try:
            result = request()
        except TransientError as error:
            return self._insist(request, error, deadline_seconds)
        self.was_reached = True
        self._report_recovery()
        return result

    def _insist(self, request: Callable[[], _T], error: TransientError, deadline_seconds: float) -> _T:
        with self._lock:
            self._num_failing += 1
        try:
            result = self._retry(request, error, deadline_seconds)
        finally:
            with self._lock:
                self._num_failing -= 1
        self._report_recovery()
        return result

    def _retry(self, request: Callable[[], _T], error: TransientError, deadline_seconds: float) -> _T:
        start = self._clock()
        for attempt in itertools.count():
            self.was_reached |= error.answered
            left = start + deadline_seconds - self._clock()
            if left <= 0:
                break
            if attempt:  # a single hiccup is not worth a line
                self._report_outage(error, start, deadline_seconds)
            delay = min(_FIRST_DELAY_SECONDS * 2 ** min(attempt, 10), _LONGEST_DELAY_SECONDS)
            self._sleep(min(delay * self._random.uniform(0.5, 1.0), left))
            try:
                result = request()
            except TransientError as again:
                error = again
            else:
                self.was_reached = True
                return result
        raise self._given_up(error, deadline_seconds) from error

    def _report_outage(self, error: TransientError, start: float, deadline_seconds: float) -> None:
        with self._lock:
            if self._reported_since is not None:
                return
            self._reported_since = start
        doubt = "" if self.was_reached else "; it has never answered so far: is the endpoint right?"
        logger.warning(
            "storage at %s does not answer (%s); retrying for up to %.0f s%s",
            self._store, error.reason, deadline_seconds, doubt,
        )  # fmt: skip

    def _report_recovery(self) -> None:
        """An outage ends with the first answer after which no request is failing; one that gives up ends nothing."""
        if self._reported_since is None:
            return
        with self._lock:
            if self._num_failing or self._reported_since is None:
                return
            since, self._reported_since = self._reported_since, None
        logger.info("storage at %s answers again after %.0f s", self._store, self._clock() - since)

    def _given_up(self, error: TransientError, deadline_seconds: float) -> StorageError:
        if self.was_reached:
            return StorageUnavailableError(
                f"storage at {self._store} did not answer for {deadline_seconds:.0f} s ({error.reason})",
                hint="run the same command again when it is back; storage.retry_deadline_seconds sets the patience",
            )
        return StorageAccessError(
            f"storage at {self._store} was never reached in {deadline_seconds:.0f} s ({error.reason})",
            hint="check the endpoint (storage.endpoint_url or AWS_ENDPOINT_URL) and that the store is running",
        )


class Connection:
    """A session with one store: its s3fs instance and what is known about its health."""

    def __init__(self, endpoint_url: str | None, connect_seconds: float, read_seconds: float) -> None:
        self.store = endpoint_url or "AWS S3"
        self.patience = Patience(self.store)
        self.known_buckets: set[str] = set()
        self._slack_seconds = connect_seconds + read_seconds
        self._endpoint_url = endpoint_url
        self._lock = threading.Lock()
        self._reader: Any = None
        self._settings = {
            "connect_timeout": connect_seconds,
            "read_timeout": read_seconds,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": 64,
            # Checksum trailers are refused by several stores that are not Amazon's.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        session = aiobotocore.session.AioSession()
        self._restrict(session)
        self._fs = s3fs.S3FileSystem(
            endpoint_url=endpoint_url,
            session=session,
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs=self._settings,
        )
        self._fs.retries = 1

    def call(self, method: str, *, size: int = 0, **arguments: Any) -> dict[str, Any]:
        """One request, tried once; `size` is the number of bytes it moves. A body is put into the answer in pieces.

        Raises TransientError, PreconditionError, RangeError, LostUploadError or a StorageError of ours.
        """
        timeout = self._slack_seconds + size / _SLOWEST_BYTES_PER_SECOND
        try:
            return sync(self._fs.loop, self._call, method, timeout, arguments)  # type: ignore[no-any-return]
        except Exception as error:
            raise self.translate(error, method, arguments) from error

    async def _call(self, method: str, timeout: float, arguments: dict[str, Any]) -> dict[str, Any]:
        async with asyncio.timeout(timeout):
            answer: dict[str, Any] = await self._fs._call_s3(method, **arguments)
            if "Body" in answer:
                async with answer["Body"] as body:
                    answer["Body"] = [chunk async for chunk in _small_chunks(body)]
        return answer

    def open(self, **arguments: Any) -> Body:
        """An object whose content the calling thread reads by itself, as it comes; tried once.

        Large amounts take a third less of a processor's time on this way than through the event loop. Raises as `call`.
        """
        try:
            answer = self._find_reader().get_object(**arguments)
        except Exception as error:
            raise self.translate(error, "get_object", arguments) from error
        return Body(self, answer, arguments)

    def _find_reader(self) -> Any:
        with self._lock:  # making a client is not for several threads
            if self._reader is None:
                session = botocore.session.Session()
                self._restrict(session)
                config = botocore.config.Config(**self._settings)
                self._reader = session.create_client("s3", endpoint_url=self._endpoint_url, config=config)
            return self._reader

    def _restrict(self, session: botocore.session.Session) -> None:
        """No machine role of Amazon's opens another store, and asking for one hangs where there is no such service."""
        if self._endpoint_url and "amazonaws.com" not in self._endpoint_url:
            session.get_component("credential_provider").remove("iam-role")

    def translate(self, error: Exception, method: str, arguments: dict[str, Any]) -> Exception:
        """What an exception of a request means, as one of those that `call` raises."""
        uri = _uri(arguments["Bucket"], arguments.get("Key", arguments.get("Prefix", "")))
        answer = _client_error(error)
        if answer is not None:
            return self._translate_answer(answer, uri, arguments["Bucket"])
        if isinstance(error, _CREDENTIAL_ERRORS):
            return StorageAccessError(
                f"{uri}: no usable credentials for the storage at {self.store} ({error})",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            )
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return StorageAccessError(
                f"the certificate of the storage at {self.store} is not trusted ({error})",
                hint="set AWS_CA_BUNDLE to the certificate of its authority",
            )
        if isinstance(error, _CONNECTION_ERRORS):
            return TransientError(_reason(error), answered=False)
        if isinstance(error, (boto.BotoCoreError, ValueError)):
            return StorageAccessError(
                f"{uri} at {self.store}: {error}", hint="check the name of the bucket and the endpoint"
            )
        return StorageError(f"{method} of {uri} failed: {type(error).__name__}: {error}")

    def _translate_answer(self, error: boto.ClientError, uri: str, bucket: str) -> Exception:
        """What an answer with an error status means."""
        self.patience.was_reached = True
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        text = str(error.response.get("Error", {}).get("Message", ""))
        said = f"HTTP {status} {code}" if code != str(status) else f"HTTP {status}"
        if code == "NoSuchUpload":
            return LostUploadError(said)
        if code == "NoSuchBucket":
            return StorageAccessError(
                f"there is no bucket {bucket!r} at {self.store}", hint="check its name, or create it first"
            )
        if status == 412:
            return PreconditionError(said)
        if status == 416:
            return RangeError(said)
        if code in _TRANSIENT_CODES or status in (408, 429) or (status >= 500 and status != 501):
            return TransientError(said, answered=True)
        if code in _ACCESS_CODES or status in (301, 307, 401, 403):
            return StorageAccessError(
                f"{uri}: access refused by the storage at {self.store} ({said}: {text})",
                hint="check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), their rights on the bucket, "
                "and the region (AWS_DEFAULT_REGION)",
            )
        if status == 404:
            return ObjectNotFoundError(f"{uri} does not exist", hint="check the path for a typing error")
        return StorageError(f"{uri}: the storage at {self.store} refused the request ({said}: {text})")


class Body:
    """The content of an answer, read piece by piece."""

    def __init__(self, connection: Connection, answer: dict[str, Any], arguments: dict[str, Any]) -> None:
        self.range = str(answer.get("ContentRange"))
        """What part of what it is: `bytes 0-99/200`."""
        self._connection = connection
        self._content = answer["Body"]
        self._arguments = arguments

    def read(self) -> bytes:
        """Some more. Raises TransientError where there is none."""
        try:
            chunk: bytes = self._content.read(_READ_BYTES)
        except Exception as error:
            raise self._connection.translate(error, "get_object", self._arguments) from error
        if not chunk:
            raise TransientError("the answer broke off", answered=True)
        return chunk

    def close(self) -> None:
        """Give up what was not read."""
        self._content.close()


class S3Objects:
    """One bucket. Keys begin with its name, as in `bucket/folder/object`. Implements `opensora.storage.Backend`."""

    def __init__(self, bucket: str, *, config: StorageConfig) -> None:
        self._bucket = bucket
        self._deadline_seconds = config.retry_deadline_seconds
        endpoint_url = (
            config.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        )
        settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        self._connection = _connect(
            endpoint_url, config.connect_timeout_seconds, config.read_timeout_seconds, settings, os.getpid()
        )

    def uri(self, key: str) -> str:
        return f"s3://{key}"

    def piece(self, key: str, start: int, length: int, *, etag: str | None = None) -> Piece:
        chunks, total, tag = self._range(key, start, length, etag=etag)
        return Piece(b"".join(chunks), total, tag)

    def _range(self, key: str, start: int, length: int, *, etag: str | None) -> tuple[list[bytes], int, str | None]:
        """A range in pieces, the size of the object, and its ETag."""
        if length == 0:
            _, total, _, tag = self.info(key)
            return [], total, tag
        arguments = {"Range": f"bytes={start}-{start + length - 1}"} | ({"IfMatch": etag} if etag else {})
        try:
            answer = self._request("get_object", key=key, size=length, **arguments)
        except RangeError:
            # Also the answer for any range of an empty object.
            _, total, _, tag = self.info(key)
            return [], total, tag
        except PreconditionError as error:
            raise changed_error(self.uri(key)) from error
        _, slash, total_text = str(answer.get("ContentRange", "")).rpartition("/")
        chunks: list[bytes] = answer["Body"]
        return chunks, int(total_text) if slash else sum(map(len, chunks)), answer.get("ETag")

    def chunks(self, key: str) -> Iterator[bytes]:
        first, total, etag = self._range(key, 0, PART_BYTES, etag=None)
        yield from first
        starts = range(sum(map(len, first)), total, PART_BYTES)

        def fetch(start: int) -> list[bytes]:
            length = min(PART_BYTES, total - start)
            chunks, _, _ = self._range(key, start, length, etag=etag)
            count = sum(map(len, chunks))
            if count != length:
                raise StorageError(f"{self.uri(key)}: got {count} of {length} bytes at {start}")
            return chunks

        if starts:
            for chunks in _in_order(fetch, starts):
                yield from chunks

    def stream(self, known: Entry, *, start: int) -> Iterator[bytes]:
        total = known[1]
        if total - start <= 2 * PART_BYTES:
            yield from self._follow(known, start, total)
            return

        def fetch(start: int) -> list[bytes]:
            return list(self._follow(known, start, min(start + PART_BYTES, total)))

        for chunks in _in_order(fetch, range(start, total, PART_BYTES)):
            yield from chunks

    def _follow(self, known: Entry, start: int, end: int) -> Iterator[bytes]:
        """A range as it comes; where it breaks off, it is asked for again from there on."""
        body: Body | None = None

        def go_on() -> bytes:
            nonlocal body
            if body is None:
                body = self._open(known, start, end)
            try:
                return body.read()
            except TransientError:
                body.close()
                body = None
                raise

        try:
            while start < end:
                chunk = self._connection.patience.run(go_on, deadline_seconds=self._deadline_seconds)
                start += len(chunk)
                yield chunk
        finally:
            if body is not None:
                body.close()

    def _open(self, known: Entry, start: int, end: int) -> Body:
        key, total, _, etag = known
        arguments = {"Range": f"bytes={start}-{end - 1}"} | ({"IfMatch": etag} if etag else {})
        try:
            body = self._connection.open(Bucket=self._bucket, Key=self._name(key), **arguments)
        except (PreconditionError, RangeError) as error:
            raise changed_error(self.uri(key)) from error
        if body.range != f"bytes {start}-{end - 1}/{total}":
            body.close()
            raise changed_error(self.uri(key))
        return body

    def info(self, key: str) -> Entry:
        answer = self._request("head_object", key=key)
        return key, answer["ContentLength"], answer["LastModified"].timestamp(), answer.get("ETag")

    def put(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None:
        if size <= 2 * PART_BYTES:
            self._request("put_object", key=key, size=size, Body=read(0, size))
            return
        for attempt in range(3):
            try:
                self._put_in_parts(key, size, read)
                return
            except LostUploadError as error:
                # The store cleaned up or lost its state; what was sent is gone.
                logger.warning("%s: the store lost the upload (%s); try %d of 3", self.uri(key), error, attempt + 1)
        raise StorageUnavailableError(f"{self.uri(key)}: the store lost the upload three times")

    def _put_in_parts(self, key: str, size: int, read: Callable[[int, int], bytes]) -> None:
        part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
        upload = self._request("create_multipart_upload", key=key)["UploadId"]

        def send(start: int) -> dict[str, Any]:
            number, length = start // part_bytes + 1, min(part_bytes, size - start)
            body = read(start, length)
            answer = self._request("upload_part", key=key, size=length, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            parts = list(_in_order(send, range(0, size, part_bytes)))
            self._complete(key, upload, parts, size)
        except BaseException:
            # Parts that nobody completes are kept, and paid for, until somebody aborts.
            try:
                self._connection.call(
                    "abort_multipart_upload", Bucket=self._bucket, Key=self._name(key), UploadId=upload
                )
            except (TransientError, LostUploadError, StorageError) as error:
                logger.debug("%s: upload %s was not aborted: %s", self.uri(key), upload, error)
            raise

    def _complete(self, key: str, upload: str, parts: list[dict[str, Any]], size: int) -> None:
        started = time.time()
        try:
            self._request("complete_multipart_upload", key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        except LostUploadError:
            # The answer to an earlier try was lost on its way: the upload is complete, and so no more known.
            try:
                _, found, modified, _ = self.info(key)
            except ObjectNotFoundError:
                found, modified = -1, 0.0
            # A minute for clocks that differ.
            if found != size or modified < started - 60:
                raise

    def create(self, key: str, data: bytes) -> bool:
        # An answer can be lost after the store took the object, and aiohttp repeats some requests by itself. The token
        # tells whether the object that is in the way is ours.
        token = uuid4().hex
        try:
            self._request(
                "put_object", key=key, size=len(data), Body=data, IfNoneMatch="*", Metadata={_TOKEN_NAME: token}
            )
        except PreconditionError:
            try:
                found = self._request("head_object", key=key)
            except ObjectNotFoundError:
                return False  # deleted since
            return bool(found.get("Metadata", {}).get(_TOKEN_NAME) == token)
        return True

    def walk(self, folder: str) -> Iterator[Entry]:
        for page in self._pages(folder):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # some tools mark folders with an empty object
                    modified = item["LastModified"].timestamp()
                    yield f"{self._bucket}/{item['Key']}", item["Size"], modified, item.get("ETag")

    def names(self, folder: str) -> list[str]:
        found: set[str] = set()
        for page in self._pages(folder, Delimiter="/"):
            found.update(item["Key"] for item in page.get("Contents", []) if not item["Key"].endswith("/"))
            found.update(item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", []))
        return [name.rpartition("/")[2] for name in found]

    def delete(self, key: str) -> None:
        try:
            self._request("delete_object", key=key)
        except ObjectNotFoundError:
            return

    def delete_tree(self, folder: str) -> None:
        names = [item["Key"] for page in self._pages(folder) for item in page.get("Contents", [])]
        # Stores that are file systems below keep empty folders, and list them, until `folder/` is deleted as well.
        names += sorted({parent for name in names for parent in _folders(name, self._name(folder))}, reverse=True)
        for start in range(0, len(names), _DELETES_PER_REQUEST):
            objects = [{"Key": name} for name in names[start : start + _DELETES_PER_REQUEST]]
            answer = self._request("delete_objects", Delete={"Objects": objects, "Quiet": True})
            for failure in answer.get("Errors", []):
                raise StorageError(
                    f"{_uri(self._bucket, failure.get('Key', ''))} was not deleted: "
                    f"{failure.get('Code')} {failure.get('Message', '')}"
                )

    def check(self) -> None:
        self._request("list_objects_v2", MaxKeys=1)

    def _pages(self, folder: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        name = self._name(folder)
        arguments["Prefix"] = f"{name}/" if name else ""
        while True:
            page = self._request("list_objects_v2", **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _name(self, key: str) -> str:
        """The key as S3 knows it: without the bucket."""
        return key[len(self._bucket) + 1 :]

    def _request(self, method: str, *, key: str | None = None, size: int = 0, **arguments: Any) -> dict[str, Any]:
        """A request with retries."""

        def request() -> dict[str, Any]:
            return self._call(method, key=key, size=size, **arguments)

        return self._connection.patience.run(request, deadline_seconds=self._deadline_seconds)

    def _call(self, method: str, *, key: str | None = None, size: int = 0, **arguments: Any) -> dict[str, Any]:
        """A request without retries."""
        if key is not None:
            arguments["Key"] = self._name(key)
        try:
            answer = self._connection.call(method, size=size, Bucket=self._bucket, **arguments)
        except ObjectNotFoundError:
            # The answer to HEAD has no body that could say whether it is the bucket that is missing.
            if method == "head_object" and self._bucket not in self._connection.known_buckets:
                self._connection.call("list_objects_v2", Bucket=self._bucket, MaxKeys=1)
                self._connection.known_buckets.add(self._bucket)
            raise
        self._connection.known_buckets.add(self._bucket)
        return answer


@cache
def _connect(
    endpoint_url: str | None,
    connect_seconds: float,
    read_seconds: float,
    settings: tuple[tuple[str, str], ...],
    pid: int,
) -> Connection:
    """One session for all storages that are reached alike. `settings` (the AWS_* variables) and `pid` are in the key
    because botocore reads its credentials from the environment, and because no session survives a fork. A process needs
    few; they are kept to its end, since s3fs gives a dropped one only 0.1 s to close, too little on a busy machine."""
    return Connection(endpoint_url, connect_seconds, read_seconds)


def _in_order(work: Callable[[int], _T], starts: Iterable[int]) -> Iterator[_T]:
    """Results of `work` on several threads, in order, and never many more of them in memory than threads."""
    with ThreadPoolExecutor(_NUM_STREAMS, thread_name_prefix="s3") as pool:
        waiting: deque[Future[_T]] = deque()
        try:
            for start in starts:
                waiting.append(pool.submit(work, start))
                if len(waiting) > _NUM_STREAMS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


async def _small_chunks(body: Any) -> AsyncIterator[bytes]:
    while chunk := await body.read(_READ_BYTES):
        yield chunk


def _uri(bucket: str, name: str) -> str:
    return f"s3://{bucket}/{name}".rstrip("/")


def _folders(name: str, top: str) -> Iterator[str]:
    """The keys of the folders that an object lies in, up to `top`, each with its slash at the end."""
    for index in range(len(top), len(name) - 1):
        if name[index] == "/":
            yield name[: index + 1]


def _client_error(error: BaseException | None) -> boto.ClientError | None:
    """The store's own answer below the built-in exceptions that s3fs makes of it."""
    while error is not None:
        if isinstance(error, boto.ClientError):
            return error
        error = error.__cause__
    return None


def _reason(error: Exception) -> str:
    """The class that names the problem best: what the socket said rather than "could not connect"."""
    wrappers = (boto.ConnectionError, boto.HTTPClientError)
    return type(error.__cause__ if isinstance(error, wrappers) and error.__cause__ else error).__name__
