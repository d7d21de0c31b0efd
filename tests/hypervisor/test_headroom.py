"""What this host can still give: the smallest of what the kernel has and what every control group allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmmigrate.hypervisor.headroom import available_bytes

MIB = 1 << 20
HOST_HAS = 1000 * MIB


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 4096000 kB\nMemAvailable: {HOST_HAS >> 10} kB\n")
    return proc


def group_v2(path: Path, limit: str, usage: int, unused_files: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{usage}\n")
    (path / "memory.stat").write_text(f"anon 1\ninactive_file {unused_files}\n")


def group_v1(path: Path, limit: int, usage: int, unused_files: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (path / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (path / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {unused_files}\n")


def test_without_control_groups_it_is_what_the_kernel_says(proc: Path, tmp_path: Path) -> None:
    assert available_bytes(proc, tmp_path / "none") == HOST_HAS


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"": ("max", 0), "system": ("max", 0), "system/daemon": ("max", 0)}, HOST_HAS),
        ({"system": ("max", 0), "system/daemon": (str(500 * MIB), 100 * MIB)}, 400 * MIB),
        ({"system": (str(300 * MIB), 250 * MIB), "system/daemon": (str(500 * MIB), 100 * MIB)}, 50 * MIB),
        ({"system/daemon": (str(100 * MIB), 200 * MIB)}, 0),
    ],
    ids=["no limit", "its own", "that of the group above", "more is used than allowed"],
)
def test_every_group_above_the_process_limits_it(
    proc: Path, tmp_path: Path, limits: dict[str, tuple[str, int]], expected: int
) -> None:
    cgroups = tmp_path / "cgroup"
    (proc / "self/cgroup").write_text("0::/system/daemon\n")
    for name, (limit, usage) in limits.items():
        group_v2(cgroups / name, limit, usage)

    assert available_bytes(proc, cgroups) == expected


def test_file_pages_that_nobody_uses_can_be_had(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/daemon\n")
    group_v2(tmp_path / "cgroup/daemon", str(100 * MIB), 90 * MIB, 60 * MIB)

    assert available_bytes(proc, tmp_path / "cgroup") == 70 * MIB


def test_the_first_version_of_control_groups_is_read_as_well(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("9:cpu:/x\n4:memory:/daemon\n0::/\n")
    group_v1(tmp_path / "cgroup/memory/daemon", 100 * MIB, 40 * MIB, 10 * MIB)
    group_v1(tmp_path / "cgroup/memory", 1 << 62, 4000 * MIB)

    assert available_bytes(proc, tmp_path / "cgroup") == 70 * MIB


def test_in_a_container_whose_path_is_not_mounted_the_group_that_is_mounted_counts(proc: Path, tmp_path: Path) -> None:
    (proc / "self/cgroup").write_text("0::/host/only/path\n")
    group_v2(tmp_path / "cgroup", str(100 * MIB), 40 * MIB)

    assert available_bytes(proc, tmp_path / "cgroup") == 60 * MIB


def test_this_very_host_has_memory() -> None:
    assert available_bytes() > 0
