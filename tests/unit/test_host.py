"""Free memory of the host: the lowest of the limits of the machine, its cgroups and the address space."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

import worker.memory.host
from worker.memory.host import Memory, host_memory, lockable_bytes, oom_kills

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
NO_LIMIT_V1 = (1 << 63) - 4096  # the value of version 1 for no limit
FILES = {  # limit, use, and the line of the page cache in memory.stat
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


class Host:
    """A machine with 64 GiB of memory, 40 GiB of it available, as files of /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroup.mkdir()
        self.has(64 * GIB, 40 * GIB)
        self.is_in("0::/")

    def has(self, total: int, available: int) -> None:
        """Write meminfo in the format of proc_meminfo(5): kibibytes, some lines without a unit."""
        lines = {"MemTotal": total, "MemFree": 2 * GIB, "MemAvailable": available, "Cached": 30 * GIB}
        text = "".join(f"{name + ':':<16}{value // KIB:>8} kB\n" for name, value in lines.items())
        (self.proc / "meminfo").write_text(f"{text}HugePages_Total:       0\nDirectMap2M:      123 kB\n")

    def is_in(self, *lines: str) -> None:
        """Set the cgroups of this process, in the format of /proc/self/cgroup (cgroups(7))."""
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))

    def group(self, path: str, limit: int | str, used: int, cache: int = 0, *, version: int = 2) -> None:
        """Add a cgroup with a memory controller below the mount of its version."""
        folder = (self.cgroup / "memory" if version == 1 else self.cgroup) / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        limit_file, use_file, cache_line = FILES[version]
        (folder / limit_file).write_text(f"{limit}\n")
        (folder / use_file).write_text(f"{used}\n")
        other = "inactive_file 7\n" if version == 1 else ""  # counts this cgroup without its children
        (folder / "memory.stat").write_text(f"anon 1\n{other}{cache_line} {cache}\nactive_file {3 * GIB}\n")

    @property
    def memory(self) -> Memory:
        return host_memory(self.proc, self.cgroup)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


UNBOUNDED = Memory(64 * GIB, 40 * GIB)


# ---- the machine


def test_without_limits_the_machine_decides(host: Host) -> None:
    assert host.memory == UNBOUNDED


def test_a_machine_without_meminfo_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="meminfo"):
        host_memory(tmp_path / "proc", tmp_path / "cgroup")


def test_a_kernel_without_cgroups_has_no_cgroup_limits(host: Host) -> None:
    (host.proc / "self/cgroup").unlink()
    assert host.memory == UNBOUNDED


def test_this_machine_has_some_memory() -> None:
    memory = host_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes


# ---- cgroups


def in_v1(path: str) -> list[str]:
    return ["9:name=systemd:/", "8:cpu,cpuacct:/", f"4:memory:{path}", "0::/"]


def in_v2(path: str) -> list[str]:
    return [f"0::{path}"]


versions = pytest.mark.parametrize(("version", "lines"), [(1, in_v1), (2, in_v2)])


@versions
def test_a_cgroup_limits_the_memory(host: Host, version: int, lines: Callable[[str], list[str]]) -> None:
    host.is_in(*lines("/pods/ours"))
    host.group("/pods/ours", 8 * GIB, 3 * GIB, version=version)
    assert host.memory == Memory(8 * GIB, 5 * GIB)


@versions
def test_reclaimable_page_cache_counts_as_free(host: Host, version: int, lines: Callable[[str], list[str]]) -> None:
    """Most of the memory use of a loader is page cache of the files that it read."""
    host.is_in(*lines("/ours"))
    host.group("/ours", 8 * GIB, 7 * GIB, cache=6 * GIB, version=version)
    assert host.memory == Memory(8 * GIB, 7 * GIB)


@versions
def test_each_parent_cgroup_limits_the_memory(host: Host, version: int, lines: Callable[[str], list[str]]) -> None:
    """The own cgroup has room, its parent is nearly full, and the outermost has the lowest limit."""
    host.is_in(*lines("/outer/middle/ours"))
    host.group("/outer/middle/ours", 8 * GIB, 1 * GIB, version=version)
    host.group("/outer/middle", 16 * GIB, 15 * GIB, version=version)
    host.group("/outer", 6 * GIB, 2 * GIB, version=version)
    assert host.memory == Memory(6 * GIB, 1 * GIB)


@versions
def test_a_limit_above_the_machines_memory_has_no_effect(
    host: Host, version: int, lines: Callable[[str], list[str]]
) -> None:
    host.is_in(*lines("/ours"))
    host.group("/ours", 1 * TIB, 1 * GIB, version=version)
    assert host.memory == UNBOUNDED


@pytest.mark.parametrize(
    ("version", "lines", "no_limit"), [(1, in_v1, NO_LIMIT_V1), (1, in_v1, (1 << 63) - 1), (2, in_v2, "max")]
)
def test_a_cgroup_without_a_limit_leaves_its_parents_limit(
    host: Host, version: int, lines: Callable[[str], list[str]], no_limit: int | str
) -> None:
    host.is_in(*lines("/outer/ours"))
    host.group("/outer/ours", no_limit, 3 * GIB, version=version)
    assert host.memory == UNBOUNDED
    host.group("/outer", 8 * GIB, 3 * GIB, version=version)
    assert host.memory == Memory(8 * GIB, 5 * GIB)


@versions
def test_a_cgroup_above_its_limit_has_no_free_memory(
    host: Host, version: int, lines: Callable[[str], list[str]]
) -> None:
    """A limit can be lowered below the current use."""
    host.is_in(*lines("/ours"))
    host.group("/ours", 2 * GIB, 3 * GIB, version=version)
    assert host.memory == Memory(2 * GIB, 0)


@versions
def test_the_root_of_a_container_is_its_own_cgroup(host: Host, version: int, lines: Callable[[str], list[str]]) -> None:
    """The path belongs to the host and does not exist in the container."""
    host.is_in(*lines("/system.slice/docker-0123.scope"))
    host.group("/", 8 * GIB, 3 * GIB, version=version)
    assert host.memory == Memory(8 * GIB, 5 * GIB)


def test_a_cgroup_path_above_the_root_is_not_followed(host: Host) -> None:
    """The kernel shows such a path to a process moved out of its cgroup namespace (cgroup_namespaces(7))."""
    host.is_in("0::/../elsewhere")
    host.group("/", 8 * GIB, 3 * GIB)
    assert host.memory == Memory(8 * GIB, 5 * GIB)


@versions
@pytest.mark.parametrize("missing", [0, 1])
def test_a_cgroup_without_the_memory_controller_is_no_limit(
    host: Host, version: int, lines: Callable[[str], list[str]], missing: int
) -> None:
    host.is_in(*lines("/outer/ours"))
    host.group("/outer", 8 * GIB, 3 * GIB, version=version)
    host.group("/outer/ours", 1 * GIB, 0, version=version)
    folder = host.cgroup / ("memory/outer/ours" if version == 1 else "outer/ours")
    (folder / FILES[version][missing]).unlink()
    assert host.memory == Memory(8 * GIB, 5 * GIB)


def test_cgroups_of_other_controllers_are_ignored(host: Host) -> None:
    host.is_in("5:cpu,cpuacct:/elsewhere", "4:memory:/ours", "1:name=memory:/elsewhere", "0::/elsewhere")
    host.group("/ours", 8 * GIB, 3 * GIB, version=1)
    host.group("/elsewhere", 1 * GIB, 0, version=1)
    assert host.memory == Memory(8 * GIB, 5 * GIB)


def test_limits_of_both_cgroup_versions_count(host: Host) -> None:
    host.is_in("4:memory:/ours", "0::/ours")
    host.group("/ours", 8 * GIB, 3 * GIB, version=1)
    host.group("/ours", 6 * GIB, 2 * GIB, version=2)
    assert host.memory == Memory(6 * GIB, 4 * GIB)


def test_a_cgroup_may_have_a_colon_in_its_name(host: Host) -> None:
    host.is_in("0::/a:b/ours")
    host.group("/a:b/ours", 8 * GIB, 3 * GIB)
    assert host.memory == Memory(8 * GIB, 5 * GIB)


# ---- address space


def test_a_limit_on_address_space_limits_the_memory(host: Host) -> None:
    host.has(64 * TIB, 32 * TIB)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 * TIB, hard))
    try:
        assert host.memory == Memory(8 * TIB, 8 * TIB)
        host.has(64 * TIB, 3 * TIB)
        assert host.memory == Memory(8 * TIB, 3 * TIB)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert host.memory == Memory(64 * TIB, 3 * TIB)


# ---- out-of-memory kills


@pytest.mark.parametrize(
    ("text", "kills"),
    [
        ("nr_free_pages 1\noom_kill 3\nnuma_hit 9\n", 3),
        ("oom_kill 0\n", 0),
        ("nr_free_pages 1\nnot_an_oom_kill 3\n", 0),  # a kernel before 4.13 has no counter
        ("", 0),
    ],
)
def test_the_kills_of_the_kernel_are_counted(
    host: Host, monkeypatch: pytest.MonkeyPatch, text: str, kills: int
) -> None:
    monkeypatch.setattr(worker.memory.host, "PROC", host.proc)
    (host.proc / "vmstat").write_text(text)
    assert oom_kills() == kills


def test_a_kernel_without_vmstat_counts_as_no_kills(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.memory.host, "PROC", host.proc)
    assert oom_kills() == 0


# ---- memory that can be locked


def test_all_page_cache_of_a_cgroup_can_be_locked(host: Host) -> None:
    """A file that was read twice is no longer inactive, and is what a load locks."""
    host.is_in("0::/a")
    host.group("/a", 8 * GIB, used=7 * GIB, cache=2 * GIB)
    assert host.memory.free_bytes == 3 * GIB
    assert lockable_bytes(host.proc, host.cgroup) == 6 * GIB


def test_the_machine_limits_what_can_be_locked(host: Host) -> None:
    assert lockable_bytes(host.proc, host.cgroup) == 40 * GIB
    host.is_in("0::/a")
    host.group("/a", 48 * GIB, used=0)
    assert lockable_bytes(host.proc, host.cgroup) == 40 * GIB


def test_what_is_locked_already_cannot_be_locked(host: Host) -> None:
    pages = {"nr_foll_pin_acquired": 10 * GIB // 4096, "nr_foll_pin_released": 2 * GIB // 4096}
    (host.proc / "vmstat").write_text("".join(f"{name} {n}\n" for name, n in pages.items()))
    assert lockable_bytes(host.proc, host.cgroup) == 32 * GIB
