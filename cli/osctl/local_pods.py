"""Pods as processes of this machine: their command, environment and files as the operator rendered them.

What cannot be the same here is replaced in `Rendering` and nowhere else:

| in the cluster | here |
| --- | --- |
| `python` of the image | the Python that runs osctl |
| the ConfigMap at `/etc/opensora/run` | a private folder; the path is replaced wherever it stands |
| `OPENSORA_MASTER_ADDR`, `OPENSORA_MASTER_PORT` | 127.0.0.1, and a free port for each attempt |
| `/dev/termination-log` | a private file, named by `OPENSORA_TERMINATION_LOG` |
| `OPENSORA_PROGRESS_URL` and its files | nothing: progress is read from the run directory |
| keys of Secrets | variables of the same names that osctl was started with |
| GPUs that a device plugin hands out | `CUDA_VISIBLE_DEVICES`: to each pod its own |
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_operator.constants import JOB_INDEX, LABEL_ATTEMPT, RESERVED_ENV, RESERVED_ENV_PREFIX
from opensora_operator.plans import Object
from opensora_operator.resources import CONFIG_FOLDER

from opensora.launch import free_port
from opensora.processes import dying_with_this_process
from opensora.rank_output import READ_BYTES, log_text, split_lines
from osctl.errors import UsageError
from osctl.forecast import Files
from osctl.local_cluster import PodEnd
from osctl.local_machine import Gpus
from osctl.output import printable

_ADDRESS = "127.0.0.1"
_MAX_MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message."""
_SIGNALLED = 128
"""Exit code of a container that a signal ended, less the signal's number."""
_KILL_SECONDS = 10.0
_REFERENCE = re.compile(r"\$\$|\$\(([^()$]+)\)")


class LocalPods:
    """Starts pods, shows what they print, and leaves none behind.

    Args:
        folder: for what belongs to the pods.
        files: ConfigMaps that pods may name.
        gpus: what they get of this machine's.
        show: is given every line that they print.
    """

    def __init__(self, folder: Path, files: Files, *, gpus: Gpus, show: Callable[[str], None]) -> None:
        self._folder = folder
        self._files = files
        self._gpus = gpus
        self._show = show
        self._selector = selectors.DefaultSelector()
        self._processes: list[_Process] = []
        self._ports: dict[str, int] = {}

    def environment(self, template: Object, namespace: str) -> dict[str, str]:
        """The variables that the operator gives to the pods of a template, as far as they do not depend on the pod.

        Raises:
            UsageError: one of them comes from something that is not here.
        """
        pod = {"metadata": {"namespace": namespace}, "spec": template["spec"]}
        return variables_of(pod, template["spec"]["containers"][0], self._files)

    def start(self, pod: Object, config: Mapping[str, str]) -> _Process:
        """Start a pod. `config` becomes the files that it finds at `/etc/opensora/run`."""
        metadata = pod["metadata"]
        index, attempt = int(metadata["labels"][JOB_INDEX]), metadata["labels"][LABEL_ATTEMPT]
        folder = self._folder / metadata["name"]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for key, text in config.items():
            (folder / key).write_text(text, encoding="utf-8")
        if attempt not in self._ports:
            self._ports[attempt] = free_port(_ADDRESS)
        names, count = self._gpus.names, self._gpus.per_pod
        gpus = None if names is None else names[index * count : (index + 1) * count]
        rendering = Rendering(folder=folder, port=self._ports[attempt], gpus=gpus, index=index)
        container = pod["spec"]["containers"][0]
        variables = variables_of(pod, container, self._files)
        process = _Process(
            rendering.command(container, variables),
            rendering.environment(variables),
            message_file=rendering.message_file,
            show=self._show if index == 0 else _renamed(self._show, index),
        )
        self._selector.register(process.output, selectors.EVENT_READ, process)
        self._processes.append(process)
        return process

    def wait(self, seconds: float) -> None:
        """Show what the pods print, until this time is over or one of them has nothing more to say."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self._turn(left):
            pass

    def show_rest(self) -> None:
        """Show what has been printed already."""
        while self._selector.get_map() and self._selector.select(0):
            self._turn(0)

    def _turn(self, seconds: float) -> bool:
        """Whether an output has ended."""
        ended = False
        for key, _ in self._selector.select(seconds):
            if not key.data.pump():
                self._selector.unregister(key.fd)
                key.data.close()
                ended = True
        return ended

    def close(self) -> None:
        """Kill what still runs, with the ranks' own children, and wait for its end."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_KILL_SECONDS)
        for key in list(self._selector.get_map().values()):
            key.data.close()
        self._selector.close()


def _renamed(show: Callable[[str], None], index: int) -> Callable[[str], None]:
    """Ranks have names of their own in each line; launchers have not."""

    def show_renamed(line: str) -> None:
        show(line.replace("[launcher]", f"[launcher {index}]", 1) if line.startswith("[launcher]") else line)

    return show_renamed


class _Process:
    """The launcher of a pod, leader of a process group. When it ends, whatever way, its ranks end with it."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        message_file: Path,
        show: Callable[[str], None],
    ) -> None:
        self._message_file = message_file
        self._show = show
        self._rest = b""
        message_file.unlink(missing_ok=True)
        self.output, writer = os.pipe()
        self._popen = subprocess.Popen(
            dying_with_this_process(command),
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C at a terminal reaches osctl alone, which then asks the planner
        )
        os.close(writer)

    def poll(self) -> PodEnd | None:
        """Its end; None while it runs."""
        status = self._popen.poll()
        if status is None:
            return None
        code = status if status >= 0 else _SIGNALLED - status
        return PodEnd(code=code, time=time.time(), message=self._message())

    def terminate(self) -> None:
        """Ask it to save and end."""
        if self._popen.poll() is None:
            self._popen.terminate()

    def kill(self) -> None:
        """End it at once; the launcher's guardian ends the ranks."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def join(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)

    def pump(self) -> bool:
        """Show what has arrived; False at the end."""
        data = os.read(self.output, READ_BYTES)
        lines, self._rest = split_lines(self._rest + data)
        if not data and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            text = log_text(line)
            if text is not None:
                self._show(printable(text.decode(errors="replace").expandtabs()))
        return bool(data)

    def close(self) -> None:
        os.close(self.output)

    def _message(self) -> str:
        try:
            return self._message_file.read_bytes()[:_MAX_MESSAGE_BYTES].decode(errors="replace")
        except OSError:
            return ""


# --------------------------------------------------------------------------------------------------------- rendering


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Everything in which a pod differs here from what the operator rendered: the table at the top of this file."""

    folder: Path
    port: int
    gpus: Sequence[str] | None
    index: int

    @property
    def message_file(self) -> Path:
        return self.folder / "termination-log"

    def command(self, container: Object, variables: Mapping[str, str]) -> list[str]:
        python, *words = (_expanded(word, variables) for word in (*container["command"], *container["args"]))
        assert python == "python", f"a trainer's command begins with python, not {python}"
        return [sys.executable, *map(self._path, words)]

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """That of osctl, over it the operator's, over it what is different here."""
        given = {name: self._path(value) for name, value in variables.items()}
        own = {
            "OPENSORA_MASTER_ADDR": _ADDRESS,
            "OPENSORA_MASTER_PORT": str(self.port),
            "OPENSORA_TERMINATION_LOG": str(self.message_file),
            "JOB_COMPLETION_INDEX": str(self.index),
        }
        if self.gpus is not None:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        known = {name: value for name, value in given.items() if not name.startswith("OPENSORA_PROGRESS_")}
        return {**_outer_environment(), **known, **own}

    def _path(self, text: str) -> str:
        return text.replace(CONFIG_FOLDER, str(self.folder))


def _outer_environment() -> dict[str, str]:
    """What osctl was started with, without what would be taken for the operator's words."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in RESERVED_ENV and not name.startswith(RESERVED_ENV_PREFIX)
    }


def variables_of(pod: Object, container: Object, files: Files) -> dict[str, str]:
    """The variables of a container, put together as the kubelet does."""
    namespace = pod["metadata"]["namespace"]
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" not in source:
            continue  # the keys of a Secret come from the environment of osctl
        ref = source["configMapRef"]
        data = files.config_map(namespace, ref["name"])
        if data is None and not ref.get("optional"):
            raise UsageError(
                f"the pods take variables from the ConfigMap {ref['name']}, which is not here",
                hint="put its manifest into the run file",
            )
        found |= {source.get("prefix", "") + key: value for key, value in (data or {}).items()}
    for variable in container["env"]:
        value = _value(variable, pod, files, found)
        if value is not None:
            found[variable["name"]] = value
    return found


def _value(variable: Object, pod: Object, files: Files, earlier: Mapping[str, str]) -> str | None:
    """The value of a variable; None where it has none and needs none."""
    name, source = variable["name"], variable.get("valueFrom")
    if source is None:
        return _expanded(variable.get("value", ""), earlier)
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    if "configMapKeyRef" in source:
        ref = source["configMapKeyRef"]
        value = (files.config_map(pod["metadata"]["namespace"], ref["name"]) or {}).get(ref["key"])
        what, remedy = f"key {ref['key']} of the ConfigMap {ref['name']}", "put its manifest into the run file"
    else:
        ref = source["secretKeyRef"]
        value = os.environ.get(name)
        what, remedy = f"key {ref['key']} of the Secret {ref['name']}", f"set {name} in your environment"
    if value is None and not ref.get("optional"):
        raise UsageError(f"the variable {name} comes from {what}, which is not here", hint=remedy)
    return value


def _field(pod: Object, path: str) -> str:
    """A field of the pod; what this machine gives nobody is empty."""
    if path in ("status.podIP", "status.hostIP"):
        return _ADDRESS
    key = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if key is not None:
        return str((pod["metadata"].get(key[1]) or {}).get(key[2], ""))
    value: Any = pod
    for part in path.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return value if isinstance(value, str) else ""


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` is the value of a variable, where there is one, and `$$` a dollar sign."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[1] is None else variables.get(match[1], match[0])

    return _REFERENCE.sub(value, text)
