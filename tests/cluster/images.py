"""Container images without a registry: archives written by hand, and a Python that comes from the node."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import build

REPOSITORY = Path(__file__).resolve().parents[2]
PAUSE = "opensora-pause:test"
TRAINER = "opensora-trainer:test"
USER = 65532
"""Whom pods run as."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_image(
    path: Path,
    name: str,
    files: Mapping[str, bytes],
    *,
    programs: Sequence[str] = (),
    entrypoint: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    user: str = "",
) -> Path:
    """Write an image of one layer as `docker save` would. `programs` names those files that can be executed."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for file_name, content in sorted(files.items()):
            _add(archive, file_name, content, 0o755 if file_name in programs else 0o644)
        _add_folder(archive, "tmp", 0o1777)
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "Entrypoint": list(entrypoint),
            "Env": [f"{key}={value}" for key, value in (environment or {}).items()],
            "User": user,
            "WorkingDir": "/tmp",
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, mode="w") as archive:
        _add(archive, "layer.tar", layer.getvalue())
        _add(archive, "config.json", json.dumps(config).encode())
        _add(archive, "manifest.json", json.dumps(manifest).encode())
    return path


def write_pause_image(path: Path) -> Path:
    """The image that keeps each pod's sandbox open."""
    program = (build.ensure("pause") / "pause").read_bytes()
    return write_image(path, PAUSE, {"pause": program}, programs=["pause"], entrypoint=["/pause"], user=str(USER))


def write_python_image(path: Path, name: str = TRAINER) -> Path:
    """An image with next to nothing in it. Its pods mount `python_mounts`, and `python` is the one that runs this."""
    files = {
        "etc/passwd": f"root:x:0:0::/root:/bin/sh\nopensora:x:{USER}:{USER}::/tmp:/bin/sh\n".encode(),
        "etc/group": f"root:x:0:\nopensora:x:{USER}:\n".encode(),
        "etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\n",
    }
    environment = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/tmp",
        "PYTHONDONTWRITEBYTECODE": "1",  # what is mounted is read-only
        "PYTHONUNBUFFERED": "1",
    }
    return write_image(path, name, files, environment=environment, user=f"{USER}:{USER}")


def python_mounts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and volume mounts, for a pod template, that bring this Python with all its packages from the node.

    The system's libraries, the interpreter, the virtual environment and this repository, at their own paths, read-only.
    """
    wanted = ["/usr", "/bin", "/lib", "/lib64", "/etc/ssl", "/etc/ld.so.cache", "/etc/alternatives"]
    wanted += [sys.base_prefix, sys.prefix, str(REPOSITORY)]
    paths: list[str] = []
    for path in sorted(wanted):  # a folder comes before what it contains
        inside = any(Path(path).is_relative_to(outer) for outer in paths)
        if os.path.exists(path) and not inside:
            paths.append(path)
    names = [
        f"node{path.replace('/', '-').replace('.', '-').replace('_', '-').lower()}"[:63].rstrip("-") for path in paths
    ]
    volumes = [{"name": name, "hostPath": {"path": path}} for name, path in zip(names, paths, strict=True)]
    mounts = [{"name": name, "mountPath": path, "readOnly": True} for name, path in zip(names, paths, strict=True)]
    return volumes, mounts


def restricted() -> tuple[dict[str, Any], dict[str, Any]]:
    """Security contexts of a pod and of its containers: as little as hostPath volumes leave possible."""
    user = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER}
    return user | {"seccompProfile": {"type": "RuntimeDefault"}}, {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def python_pod(command: Sequence[str], **container: Any) -> dict[str, Any]:
    """A pod spec that runs a command once in the trainer image; `container` replaces parts of its container."""
    volumes, mounts = python_mounts()
    pod_security, container_security = restricted()
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": pod_security,
        "volumes": volumes,
        "containers": [
            {
                "name": "main",
                "image": TRAINER,
                "command": list(command),
                "volumeMounts": mounts,
                "securityContext": container_security,
            }
            | container
        ],
    }


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    archive.addfile(member, io.BytesIO(content))


def _add_folder(archive: tarfile.TarFile, name: str, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, mode
    archive.addfile(member)
