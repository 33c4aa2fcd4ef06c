"""How many processes the kernel's OOM killer has ended in a process's memory cgroup.

A process killed for memory gets SIGKILL like any other killed process; only the counter of its cgroup tells the two
apart. Both versions of cgroups are read (Linux, Documentation/admin-guide/cgroup-v{1/memory,2}.rst); where there is
none, as on other systems, nothing is counted.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
_UNLIMITED_BYTES = 2**60
"""Version 1 says "no limit" with a number near 2**63."""


class OomKills:
    """Tells for each killed process whether the OOM killer did it: one rise of a counter explains one death."""

    def __init__(self) -> None:
        self._seen: dict[Path, int] = {}
        self._counters: dict[int, set[Path]] = {}
        self._own = memory_cgroup("self")

    def watch(self, pid: int) -> None:
        """Note the cgroup of a process while it lives; call again since it may move. A dead one has none."""
        for folder in (self._own, memory_cgroup(pid)):
            if folder is not None:
                self._counters.setdefault(pid, set()).add(folder)
                self._seen.setdefault(folder, count_oom_kills(folder))

    def killed(self, pid: int) -> bool:
        """Whether the OOM killer explains that this process was killed."""
        risen = [f for f in self._counters.get(pid, ()) if count_oom_kills(f) > self._seen[f]]
        for folder in risen:
            self._seen[folder] += 1
        return bool(risen)

    def limit_bytes(self, pid: int) -> int | None:
        """The smallest memory limit of the cgroups that the process was seen in."""
        limits = [limit for folder in self._counters.get(pid, ()) if (limit := memory_limit(folder)) is not None]
        return min(limits, default=None)


def memory_cgroup(pid: int | str) -> Path | None:
    """Folder of the memory cgroup of a process, `"self"` for this one."""
    try:
        membership = Path(f"/proc/{pid}/cgroup").read_text()
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:  # not Linux, or the process is gone
        return None
    return find_memory_cgroup(membership, mounts)


def find_memory_cgroup(membership: str, mounts: str) -> Path | None:
    """The same from the contents of `/proc/PID/cgroup` and `/proc/self/mountinfo`.

    Where both versions are mounted, the memory controller belongs to version 1 if that lists it. Inside a container the
    mount may show only a part of the hierarchy (its root is not `/`) while the membership is given from the top.
    """
    paths: dict[str, str] = {}
    for line in membership.splitlines():
        _, controllers, member = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), member))
    kind = "cgroup" if "memory" in paths else "cgroup2"
    path = paths.get("memory", paths.get(""))
    if path is None:
        return None
    for line in mounts.splitlines():
        place, _, filesystem = line.partition(" - ")
        fs_type, _, options = filesystem.split(" ", 2)
        if fs_type == kind and (kind == "cgroup2" or "memory" in options.split(",")):
            root, mount_point = (_unescaped(word) for word in place.split(" ")[3:5])
            visible = PurePosixPath(path).is_relative_to(root)
            return Path(mount_point, PurePosixPath(path).relative_to(root)) if visible else Path(mount_point)
    return None


def count_oom_kills(folder: Path) -> int:
    """The `oom_kill` counter of a cgroup, 0 when it cannot be read."""
    for name in ("memory.events", "memory.oom_control"):
        try:
            text = (folder / name).read_text()
        except OSError:
            continue
        return parse_oom_kills(text)
    return 0


def parse_oom_kills(text: str) -> int:
    """The counter in the contents of `memory.events` (version 2) or `memory.oom_control` (version 1, Linux 4.13)."""
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def memory_limit(folder: Path) -> int | None:
    """The memory limit of a cgroup in bytes; None for no limit."""
    for name in _LIMIT_FILES:
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < _UNLIMITED_BYTES else None
    return None


def _unescaped(word: str) -> str:
    """Undo the octal escapes of mountinfo (`\\040` is a space)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
