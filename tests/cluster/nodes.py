"""Real Kubernetes nodes on this machine: kubelet, containerd and kube-proxy, each node in namespaces of its own.

A node is a network, a mount table and a process table, which end with the node's first process. So its death is one
signal, and its mounts, interfaces and packet filter rules go with it. The nodes hang on a bridge of the cluster's own,
on which this machine is one more host: the control plane, the name server and servers of the tests are reached there.
Needs Linux and root.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import build
import images
import psutil
import yaml
from control_plane import ApiError, ControlPlane
from processes import Process, StartError, free_port

PACKAGES = ("containerd", "runc", "containernetworking-plugins", "iptables", "conntrack", "iproute2")
"""What Debian and Ubuntu call that which a node needs beyond Kubernetes."""
_PROGRAMS = ("containerd", "ctr", "runc", "iptables", "conntrack", "ip", "unshare", "nsenter")
_PLUGIN_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_READY_SECONDS = 180.0
"""Five seconds on an idle machine."""
_GONE_SECONDS = 60.0
_MAX_CLUSTERS = 16
"""So many at a time on one machine: each has address ranges of its own."""
_CGROUPS = Path("/sys/fs/cgroup")
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

_BOOT = """
# Folders of the node's disk take the places where its programs expect theirs; what does not outlive a boot is memory.
mount --make-rshared /
for place in /var/lib/kubelet /var/lib/containerd /var/log; do
    mkdir -p "$place" "$1$place"
    mount --bind "$1$place" "$place"
done
mount --bind "$1/resolv.conf" /etc/resolv.conf
mkdir -p /var/lib/cni
mount -t tmpfs tmpfs /var/lib/cni
mount -t tmpfs tmpfs /run
exec "$2"
"""
_CONNECT = """
# No default route, no way out of the cluster: whatever else is asked for is unreachable at once.
ip link set lo up
ip address add "$1/24" dev eth0
ip link set eth0 up
echo 1 > /proc/sys/net/ipv4/ip_forward
"""


@functools.cache
def why_not() -> str | None:
    """Why there can be no nodes on this machine; None when there can be. Installs Debian packages that are missing."""
    if not sys.platform.startswith("linux"):
        return "nodes need Linux"
    if os.geteuid() != 0:
        return "nodes need root, to make namespaces, bridges and cgroups"
    missing = _missing_programs()
    if missing and shutil.which("apt-get"):
        _install_packages()
        missing = _missing_programs()
    if missing:
        return f"nodes need {', '.join(missing)}; Debian has them in {' '.join(PACKAGES)}"
    answer = subprocess.run(
        [*_UNSHARE, "iptables", "-t", "nat", "-L"], capture_output=True, text=True, env={"PATH": _PATH}
    )
    if answer.returncode:
        return f"nodes need namespaces with packet filters of their own: {answer.stderr.strip()}"
    return None


class Node:
    """One node of a `Cluster`, which makes it, and what can happen to it."""

    def __init__(self, cluster: Cluster, index: int, name: str) -> None:
        self.name = name
        self.address = f"10.99.{cluster.index}.{11 + index}"
        self.pod_range = f"10.244.{8 * cluster.index + index}.0/24"
        self.disk = cluster.folder / name
        """What outlives the node's death."""
        self._cluster = cluster
        self._index = index
        self._link = f"{_prefix(cluster.index)}{index}"
        self._cgroup = f"{_prefix(cluster.index)}{name}"
        self._init: Process | None = None
        self._programs: dict[str, Process] = {}

    # What can happen to a node

    def kill(self) -> None:
        """The machine is gone: on return, every process of the node has ended, those of its pods among them."""
        if self._init is None:
            return
        if first := self._first_process():
            first.kill()  # with the first process of a process table, Linux ends all others
            self._init.wait()
        for program in (*self._programs.values(), self._init):
            program.kill()
        self._programs.clear()
        self._init = None
        _ip("link", "delete", self._link, check=False)  # Linux removes it too, but later
        _remove_cgroups(self._cgroup)

    def partition(self) -> None:
        """The machine is out of reach, but alive: kubelet and containerd end, the processes of its pods go on."""
        for name in ("kubelet", "containerd"):
            self._end(name)

    def restart(self) -> None:
        """Start what has ended, with what is on the node's disk, and wait until the API server calls the node ready."""
        heartbeat = self._heartbeat()
        self.start_runtime()
        self.start_kubelet()
        self.wait_until_ready(after=heartbeat)

    # Looking

    def processes(self) -> list[psutil.Process]:
        """Every process of the node, by the ids that this machine has for them; those of its pods among them."""
        first = self._first_process()
        if first is None:
            return []
        table = _process_table(first.pid)
        # Containers have tables of their own, but descend from a process in the node's.
        own = [process for process in psutil.process_iter() if _process_table(process.pid) == table]
        return list({*own, *(child for process in own for child in process.children(recursive=True))})

    def run(self, *command: str) -> str:
        """Run a command on the node, as its root, and return what it printed."""
        answer = subprocess.run([*self._enter(), *command], capture_output=True, text=True, env={"PATH": _PATH})
        if answer.returncode:
            raise RuntimeError(f"{self.name}: {command[0]} ended with {answer.returncode}: {answer.stderr.strip()}")
        return answer.stdout

    def is_ready(self) -> bool:
        """Whether the API server calls the node ready. Of a dead node it does so until the grace period is over."""
        with contextlib.suppress(ApiError, OSError):
            conditions = self._cluster.control_plane.request("GET", f"/api/v1/nodes/{self.name}")["status"][
                "conditions"
            ]
            return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
        return False

    def wait_until_ready(self, *, after: str = "") -> None:
        """Wait until the node is ready, and has been heard of again since a heartbeat. Raises StartError."""
        deadline = time.monotonic() + _READY_SECONDS
        while self._heartbeat() == after or not self.is_ready():
            ended = [program for program in self._programs.values() if not program.is_running]
            if ended or time.monotonic() > deadline:
                kubelet = self._programs["kubelet"]
                said = "\n".join(f"{program.name}:\n{program.log_tail()}" for program in ended or [kubelet])
                raise StartError(f"{self.name} did not become ready. {said}")
            time.sleep(0.1)

    # Parts

    def start_runtime(self) -> None:
        """Start the node without its kubelet: its namespaces, its network and containerd."""
        if self._init is None:
            self._boot()
        if "containerd" not in self._programs:
            self._launch("containerd", "containerd", "--config", str(self._write_containerd_config()))
            self._programs["containerd"].wait_until(self._has_runtime, _READY_SECONDS)

    def start_kubelet(self) -> None:
        """Start kubelet and kube-proxy, which need the API server."""
        programs = self._cluster.control_plane.bin
        if "kubelet" not in self._programs:
            self._launch(
                "kubelet",
                str(programs / "kubelet"),
                f"--config={self._write('kubelet.yaml', self._kubelet_config())}",
                f"--kubeconfig={self._cluster.control_plane.kubeconfig(f'system:node:{self.name}')}",
                f"--hostname-override={self.name}",
                f"--node-ip={self.address}",
            )
        if "kube-proxy" not in self._programs:
            config = self._write("kube-proxy.yaml", self._proxy_config())
            self._launch("kube-proxy", str(programs / "kube-proxy"), f"--config={config}")

    def load_image(self, archive: Path) -> None:
        """Give the node an image that `docker save` or `images.write_image` wrote."""
        self.run("ctr", "--namespace", "k8s.io", "image", "import", "--snapshotter", "native", str(archive))

    def _boot(self) -> None:
        _make_cgroups(self._cgroup)
        pause = str(build.ensure("pause") / "pause")
        log = self._cluster.logs / f"{self.name}-boot.log"
        self.disk.mkdir(exist_ok=True)
        (self.disk / "resolv.conf").write_text(f"nameserver {self._cluster.host_address}\n")
        self._init = Process(f"{self.name}-boot", [*_UNSHARE, "sh", "-euc", _BOOT, "boot", self.disk, pause], log)
        self._init.start()
        self._init.wait_until(self._has_booted, _READY_SECONDS)
        # The hardware address stays the same over restarts: others remember it for a while.
        hardware = f"02:99:00:00:{self._cluster.index:02x}:{self._index:02x}"
        first = self._first_process()
        assert first is not None
        _ip(
            *("link", "add", self._link, "type", "veth"),
            *("peer", "name", "eth0", "address", hardware, "netns", str(first.pid)),
        )
        _ip("link", "set", self._link, "master", self._cluster.bridge, "up")
        self.run("sh", "-euc", _CONNECT, "connect", self.address)
        for node in self._cluster.nodes.values():
            if node is not self:
                self.run("ip", "route", "add", node.pod_range, "via", node.address)

    def _first_process(self) -> psutil.Process | None:
        """The one whose end is the node's; None when it has ended."""
        if self._init is None or not self._init.is_running:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._init.pid).children()
            return children[0] if children else None
        return None

    def _has_booted(self) -> bool:
        first = self._first_process()
        return first is not None and first.name() == "pause"

    def _enter(self) -> list[str]:
        first = self._first_process()
        if first is None:
            raise RuntimeError(f"{self.name} is dead")
        return ["nsenter", "--target", str(first.pid), "--net", "--mount", "--pid", "--"]

    def _launch(self, name: str, *command: str) -> None:
        log = self._cluster.logs / f"{self.name}-{name}.log"
        self._programs[name] = Process(name, [*self._enter(), *command], log, {"PATH": _PATH})
        self._programs[name].start()

    def _end(self, name: str) -> None:
        """End a program of the node at once, which is the child of the one that entered the node for it."""
        if name in self._programs:
            program = self._programs.pop(name)
            for child in psutil.Process(program.pid).children() if program.is_running else []:
                child.kill()
            program.wait()
            program.kill()

    def _has_runtime(self) -> bool:
        with contextlib.suppress(RuntimeError):
            self.run("ctr", "version")
            return True
        return False

    def _heartbeat(self) -> str:
        """When the kubelet last said that it lives; nothing if it never did."""
        path = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{self.name}"
        with contextlib.suppress(ApiError, OSError):
            return str(self._cluster.control_plane.request("GET", path)["spec"]["renewTime"])
        return ""

    def _write(self, name: str, config: dict[str, Any]) -> Path:
        path = self.disk / name
        path.write_text(
            yaml.safe_dump(config, default_flow_style=False)
        )  # Kubernetes takes what begins with { for JSON
        return path

    def _write_containerd_config(self) -> Path:
        network = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "ptp",  # without a bridge in the node, all traffic meets kube-proxy's rules
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": self.pod_range}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ],
        }
        networks = self.disk / "networks"
        networks.mkdir(exist_ok=True)
        (networks / "pods.conflist").write_text(json.dumps(network))
        container = json.loads(self.run("ctr", "oci", "spec"))
        container["mounts"] += images.runtime_mounts()
        del container["process"]["rlimits"]  # 1024 open files would be few; without, they are the node's
        (self.disk / "container.json").write_text(json.dumps(container))
        path = self.disk / "containerd.toml"
        path.write_text(
            _CONTAINERD_CONFIG.format(
                pause=images.PAUSE,
                plugins=_plugin_folder(),
                networks=networks,
                container=self.disk / "container.json",
            )
        )
        return path

    def _kubelet_config(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self._cgroup}",  # its own: a kubelet ends what it does not know in its cgroups
            "failCgroupV1": False,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "serializeImagePulls": False,
            "nodeLeaseDurationSeconds": 4,  # a heartbeat per second
            "clusterDNS": [self._cluster.host_address],
            "clusterDomain": "cluster.local",
            "resolvConf": str(self.disk / "resolv.conf"),
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        }

    def _proxy_config(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "clientConnection": {"kubeconfig": str(self._cluster.control_plane.kubeconfig("system:kube-proxy"))},
            "hostnameOverride": self.name,
            "clusterCIDR": self._cluster.pod_range,
            "conntrack": {"maxPerCore": 0, "min": 0},
            "oomScoreAdj": 0,
        }


class Cluster:
    """A control plane and nodes, with names for services. A context manager; it also ends with this process.

    The nodes have the images of `images.write_images`. Pods reach servers of this machine at `host_address`, and this
    machine reaches pods and services at their addresses.
    """

    def __init__(self, folder: Path, *, names: Sequence[str] = ("node-a", "node-b"), **control_plane: Any) -> None:
        """`control_plane`: what `ControlPlane` is made with."""
        self.folder = folder.absolute()
        self.logs = self.folder / "logs"
        self._names = tuple(names)
        self._options = control_plane
        self._exits = contextlib.ExitStack()
        self.nodes: dict[str, Node] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pod_range(self) -> str:
        """The addresses of all pods."""
        return f"10.244.{8 * self.index}.0/21"

    @property
    def service_range(self) -> str:
        """The addresses of all services."""
        return f"10.96.{self.index}.0/24"

    def start(self) -> None:
        """Start all parts and wait until every node is ready. Raises StartError with the end of a log."""
        if reason := why_not():
            raise StartError(reason)
        build.ensure("kube", "pause", "coredns")
        self.logs.mkdir(parents=True, exist_ok=True)
        with self._exits:
            self._start()
            self._exits = self._exits.pop_all()

    def stop(self) -> None:
        """End all parts at once and remove what they left on this machine, except for logs."""
        self._exits.close()

    def load_image(self, archive: Path) -> None:
        """Give every node an image that `docker save` or `images.write_image` wrote."""
        for node in self.nodes.values():
            node.load_image(archive)

    def _start(self) -> None:
        self.index = self._exits.enter_context(_claim_addresses())
        self.host_address = f"10.99.{self.index}.1"
        self.bridge = f"{_prefix(self.index)}br"
        self.nodes = {name: Node(self, index, name) for index, name in enumerate(self._names)}
        self._make_bridge()
        self._exits.callback(self._remove_nodes)
        for node in self.nodes.values():
            node.start_runtime()
        for archive in images.write_images(self.folder):
            self.load_image(archive)
        self.control_plane = ControlPlane(
            self.folder / "control-plane",
            address=self.host_address,
            service_range=self.service_range,
            **self._options,
        )
        for name in self.nodes:
            self.control_plane.add_identity(f"system:node:{name}", groups=("system:nodes",))
        for name in ("system:kube-proxy", "system:coredns"):
            self.control_plane.add_identity(name)
        self._exits.enter_context(self.control_plane)
        self._start_name_server()
        for node in self.nodes.values():
            node.start_kubelet()
        for node in self.nodes.values():
            node.wait_until_ready()

    def _make_bridge(self) -> None:
        # With an address of its own: else it has that of a member, and when members change nobody finds it for seconds.
        _ip("link", "add", self.bridge, "address", f"02:99:00:00:{self.index:02x}:ff", "type", "bridge")
        self._exits.callback(_ip, "link", "delete", self.bridge)
        _ip("address", "add", f"{self.host_address}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for node in self.nodes.values():
            _ip("route", "add", node.pod_range, "via", node.address)
        # Any node would do: it passes on what it gets for a service.
        _ip("route", "add", self.service_range, "via", next(iter(self.nodes.values())).address)

    def _remove_nodes(self) -> None:
        for node in self.nodes.values():
            node.kill()
            shutil.rmtree(node.disk, ignore_errors=True)

    def _start_name_server(self) -> None:
        self.control_plane.apply(*_NAME_SERVER_RIGHTS)
        port = free_port()
        config = self.folder / "Corefile"
        kubeconfig = self.control_plane.kubeconfig("system:coredns")
        config.write_text(_COREFILE.format(address=self.host_address, kubeconfig=kubeconfig, port=port))
        command = (self.control_plane.bin / "coredns", "-conf", config)
        server = self._exits.enter_context(Process("coredns", command, self.logs / "coredns.log"))
        server.wait_until(lambda: _answers(f"http://127.0.0.1:{port}/ready"), _READY_SECONDS)


_CONTAINERD_CONFIG = """\
version = 2
oom_score = 0
disabled_plugins = [
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.overlayfs",
    "io.containerd.snapshotter.v1.zfs",
]
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "docker.io/library/{pause}"
# Without CAP_SYS_RESOURCE nobody may lower it, and containers would not start.
restrict_oom_score_adj = true
tolerate_missing_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"
[plugins."io.containerd.grpc.v1.cri".containerd]
# Copies files instead of stacking layers: images are tiny here, and it works on every file system.
snapshotter = "native"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
# What every container starts from: here, with mounts of this machine's Python.
base_runtime_spec = "{container}"
"""

_COREFILE = """\
cluster.local:53 {{
    bind {address}
    errors
    ready 127.0.0.1:{port}
    kubernetes cluster.local {{
        kubeconfig {kubeconfig}
        ttl 5
    }}
}}
# There are no other names here, and whoever asks is told at once.
.:53 {{
    bind {address}
    template ANY ANY . {{
        rcode NXDOMAIN
    }}
}}
"""

_NAME_SERVER_RIGHTS: tuple[dict[str, Any], ...] = (
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": "name-server"},
        "rules": [
            {"apiGroups": [""], "resources": ["services", "namespaces"], "verbs": ["list", "watch"]},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        ],
    },
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "name-server"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "name-server"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:coredns"}],
    },
)


# Addresses


def _prefix(index: int) -> str:
    """What the names of all interfaces and cgroups of a cluster begin with."""
    return f"opensora{index}-"


@contextlib.contextmanager
def _claim_addresses() -> Iterator[int]:
    """The number of a cluster, which no other has as long as this one runs. Removes what a crash left behind."""
    folder = build.cache_folder() / "networks"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(_MAX_CLUSTERS):
        with open(folder / str(index), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove_leftovers(index)
            yield index
            return
    raise StartError(f"{_MAX_CLUSTERS} clusters run on this machine already")


def _remove_leftovers(index: int) -> None:
    for link in json.loads(_ip("-json", "link", "show")):
        if link["ifname"].startswith(_prefix(index)):
            _ip("link", "delete", link["ifname"], check=False)
    names = {path.name for hierarchy in _hierarchies() for path in hierarchy.glob(f"{_prefix(index)}*")}
    for name in names:
        _remove_cgroups(name)


def _ip(*arguments: str, check: bool = True) -> str:
    answer = subprocess.run(["ip", *arguments], capture_output=True, text=True, env={"PATH": _PATH})
    if check and answer.returncode:
        raise StartError(f"ip {' '.join(arguments)}: {answer.stderr.strip()}")
    return answer.stdout


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _process_table(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""  # it has ended


# Cgroups


def _hierarchies() -> list[Path]:
    """The roots of the cgroup trees: one of version 2, or one per controller of version 1."""
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return [path for path in _CGROUPS.iterdir() if (path / "cgroup.procs").exists() and not path.is_symlink()]


def _make_cgroups(name: str) -> None:
    for hierarchy in _hierarchies():
        if (hierarchy / "cgroup.controllers").exists():  # version 2, perhaps beside version 1 and without controllers
            for controller in (hierarchy / "cgroup.controllers").read_text().split():
                with contextlib.suppress(OSError):  # some cannot be passed on, and kubelet names what it misses
                    (hierarchy / "cgroup.subtree_control").write_text(f"+{controller}")
        (hierarchy / name).mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):
            if (hierarchy / setting).exists():  # version 1, where a new cgroup has no processors
                (hierarchy / name / setting).write_text((hierarchy / setting).read_text())


def _remove_cgroups(name: str) -> None:
    """Remove a cgroup and those in it, whose processes have ended or are about to."""
    deadline = time.monotonic() + _GONE_SECONDS
    for hierarchy in _hierarchies():
        folders = [Path(folder) for folder, _, _ in os.walk(hierarchy / name, topdown=False)]
        for folder in folders:
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)


# Programs


def _missing_programs() -> list[str]:
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    return missing if _plugin_folder() else [*missing, "CNI plugins"]


def _plugin_folder() -> Path | None:
    return next((folder for folder in _PLUGIN_FOLDERS if (folder / "ptp").exists()), None)


def _install_packages() -> None:
    print(f"cluster: installing {' '.join(PACKAGES)}", file=sys.stderr, flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        subprocess.run(
            ["apt-get", "-qq", *command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
