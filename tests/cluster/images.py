"""Container images without a registry: archives written by hand, and a Python that comes from the node.

The project's images hold next to nothing. The nodes' container runtime mounts into every container what they would
hold: the system's libraries, the interpreter, the virtual environment and this repository. So manifests, chart and
samples run as they are, with what is installed and checked out here.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import sys
import tarfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import build

REPOSITORY = Path(__file__).resolve().parents[2]
_PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PAUSE = "opensora-pause:test"
OPERATOR = f"opensora-operator:{_PROJECT['version']}"
TRAINER = f"opensora-trainer:{_PROJECT['version']}"
USER = 65532
"""Whom the project's images run as."""
_ENVIRONMENT = "/opt/opensora"
"""Where containers see the virtual environment."""
_SOURCE = "/opt/source"
"""Where containers see this repository."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_image(
    path: Path,
    name: str,
    files: Mapping[str, bytes],
    *,
    programs: Sequence[str] = (),
    links: Mapping[str, str] | None = None,
    **config: Any,
) -> Path:
    """Write an image of one layer, as `docker save` would.

    `programs` names those of the files that can be executed; `config` is the image's own: Entrypoint, Env, User, …
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for file_name, content in sorted(files.items()):
            _add(archive, file_name, content, 0o755 if file_name in programs else 0o644)
        for link, target in sorted((links or {}).items()):
            _add_special(archive, link, tarfile.SYMTYPE, 0o777, target)
        _add_special(archive, "tmp", tarfile.DIRTYPE, 0o1777)
    description = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, mode="w") as archive:
        _add(archive, "layer.tar", layer.getvalue())
        _add(archive, "config.json", json.dumps(description).encode())
        _add(archive, "manifest.json", json.dumps(manifest).encode())
    return path


def write_images(folder: Path) -> list[Path]:
    """Write what every node needs: the image that keeps pods' sandboxes open, and the project's two."""
    pause = (build.ensure("pause") / "pause").read_bytes()
    return [
        write_image(folder / "pause.tar", PAUSE, {"pause": pause}, programs=["pause"], Entrypoint=["/pause"]),
        _write_project_image(folder / "operator.tar", OPERATOR, ["opensora-operator"]),
        _write_project_image(folder / "trainer.tar", TRAINER, ["python", "-m", "opensora.launch"]),
    ]


def runtime_mounts() -> list[dict[str, Any]]:
    """What the nodes' runtime mounts into every container, as the runtime's own configuration says it."""
    places = ["/usr", "/bin", "/lib", "/lib64", "/etc/ssl", "/etc/ld.so.cache", "/etc/alternatives"]
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        places.append(sys.base_prefix)  # where the virtual environment's links lead to
    sources = {place: place for place in places} | {_ENVIRONMENT: sys.prefix, _SOURCE: str(REPOSITORY)}
    return [
        {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]}
        for destination, source in sources.items()
        if Path(source).exists()
    ]


def restricted_pod(command: Sequence[str], **container: Any) -> dict[str, Any]:
    """A pod spec that runs a command once in the trainer's image; `container` replaces parts of its container.

    It keeps to the `restricted` profile of the Pod Security Standards.
    """
    main = {
        "name": "main",
        "image": TRAINER,
        "command": list(command),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [main | container],
    }


def _write_project_image(path: Path, name: str, entrypoint: Sequence[str]) -> Path:
    """As the Dockerfiles in docker/ make it, but for what the runtime mounts."""
    files = {
        "etc/passwd": f"root:x:0:0::/root:/bin/sh\nopensora:x:{USER}:{USER}::/tmp:/bin/sh\n".encode(),
        "etc/group": f"root:x:0:\nopensora:x:{USER}:\n".encode(),
        "etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\n",
    }
    # Those in the virtual environment name its interpreter by the path that it has on the node.
    scripts = {f"opt/bin/{script}": _script(*entry.split(":")) for script, entry in _PROJECT["scripts"].items()}
    environment = {
        "PATH": f"/opt/bin:{_ENVIRONMENT}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": ":".join([_SOURCE, *(f"{_SOURCE}/{folder}" for folder in ("operator", "cli"))]),
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return write_image(
        path,
        name,
        files | scripts,
        programs=list(scripts),
        links={"workspace/configs": f"{_SOURCE}/configs"},
        Entrypoint=list(entrypoint),
        Env=[f"{key}={value}" for key, value in environment.items()],
        User=f"{USER}:{USER}",
        WorkingDir="/workspace",
    )


def _script(module: str, function: str) -> bytes:
    """What calls a function as a program."""
    return (
        f"#!{_ENVIRONMENT}/bin/python\nimport sys\n\nfrom {module} import {function}\n\nsys.exit({function}())\n"
    ).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    archive.addfile(member, io.BytesIO(content))


def _add_special(archive: tarfile.TarFile, name: str, kind: bytes, mode: int, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.linkname = kind, mode, target
    archive.addfile(member)
