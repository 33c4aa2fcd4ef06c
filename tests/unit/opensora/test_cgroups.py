"""The kernel's OOM counters, in the forms that kernels and containers show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora import cgroups
from opensora.cgroups import OomKills

V1_MOUNTS = """\
30 25 0:26 / /sys/fs/cgroup rw,nosuid - tmpfs tmpfs rw,mode=755
33 30 0:29 / /sys/fs/cgroup/cpu rw shared:12 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/memory rw,relatime shared:13 - cgroup cgroup rw,memory
35 30 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
"""
V2_MOUNTS = "42 25 0:28 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate,memory_recursiveprot\n"
V1_POD_MOUNTS = "900 880 0:30 /kubepods/pod1/abc /sys/fs/cgroup/memory ro master:13 - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("membership", "mounts", "folder"),
    [
        ("4:memory:/user.slice\n0::/user.slice\n", V1_MOUNTS, "/sys/fs/cgroup/memory/user.slice"),
        ("4:memory:/\n0::/\n", V1_MOUNTS, "/sys/fs/cgroup/memory"),
        ("7:cpu,cpuacct:/a\n5:hugetlb,memory:/b:c d\n", V1_MOUNTS, "/sys/fs/cgroup/memory/b:c d"),
        ("0::/system.slice/x.service\n", V2_MOUNTS, "/sys/fs/cgroup/system.slice/x.service"),
        ("0::/\n", V2_MOUNTS, "/sys/fs/cgroup"),
        ("4:memory:/kubepods/pod1/abc\n", V1_POD_MOUNTS, "/sys/fs/cgroup/memory"),
        ("4:memory:/kubepods/pod1/abc/inner\n", V1_POD_MOUNTS, "/sys/fs/cgroup/memory/inner"),
        ("4:memory:/docker/xyz\n", V1_POD_MOUNTS, "/sys/fs/cgroup/memory"),
        ("0::/a\n", V2_MOUNTS.replace("/sys/fs/cgroup", r"/mnt/my\040groups"), "/mnt/my groups/a"),
        ("4:memory:/a\n", V2_MOUNTS, None),
        ("3:cpu:/a\n", V1_MOUNTS, None),
        ("", "", None),
    ],
    ids=[
        "version 1 in a hybrid",
        "version 1 root",
        "combined controllers, odd name",
        "version 2",
        "version 2 in a namespace",
        "pod: the mount shows only its own part",
        "a cgroup inside a pod",
        "a path that the mount does not show",
        "escaped mount point",
        "version 1 not mounted",
        "no memory controller",
        "no cgroups",
    ],
)
def test_the_memory_cgroup_is_found(membership: str, mounts: str, folder: str | None) -> None:
    assert cgroups.find_memory_cgroup(membership, mounts) == (Path(folder) if folder else None)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3),
        ("low 0\nhigh 12\nmax 40\noom 5\noom_kill 2\noom_group_kill 7\n", 2),
        ("oom_kill_disable 0\nunder_oom 0\n", 0),
        ("", 0),
    ],
    ids=["version 1", "version 2", "before Linux 4.13", "empty"],
)
def test_kills_are_counted(text: str, count: int) -> None:
    assert cgroups.parse_oom_kills(text) == count


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "104857600\n", 104857600),
        ("memory.max", "max\n", None),
        ("memory.limit_in_bytes", "104857600\n", 104857600),
        ("memory.limit_in_bytes", "9223372036854771712\n", None),
        ("other", "1", None),
    ],
)
def test_the_limit_is_read(tmp_path: Path, name: str, text: str, limit: int | None) -> None:
    (tmp_path / name).write_text(text)
    assert cgroups.memory_limit(tmp_path) == limit


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "memory.events").write_text("oom_kill 5\n")
    monkeypatch.setattr(cgroups, "memory_cgroup", lambda pid: tmp_path)
    return tmp_path


def test_a_kill_from_before_the_run_explains_nothing(cgroup: Path) -> None:
    kills = OomKills()
    kills.watch(11)
    assert not kills.killed(11)


def test_each_kill_explains_one_death(cgroup: Path) -> None:
    kills = OomKills()
    kills.watch(11)
    kills.watch(12)
    (cgroup / "memory.events").write_text("oom_kill 6\n")
    assert kills.killed(11)
    assert not kills.killed(12)


def test_where_nothing_is_counted_nothing_is_blamed_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "memory_cgroup", lambda pid: None)
    kills = OomKills()
    kills.watch(11)
    assert not kills.killed(11)
    assert kills.limit_bytes(11) is None
