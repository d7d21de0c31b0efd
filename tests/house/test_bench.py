"""Benchmarks run, and say what their contract says. How fast anything is, no test asserts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.bench_consoles import fault_of

ROOT = Path(__file__).resolve().parent.parent.parent


def printed_by(bench: str, *options: str) -> dict[str, Any]:
    """The JSON document of a run that succeeded."""
    command = [sys.executable, f"bench/{bench}.py", "--json", *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    printed: dict[str, Any] = json.loads(ran.stdout)
    assert set(printed) == {"name", "ratios", "runs"}
    assert printed["name"] == bench
    assert printed["ratios"]
    # A share of moves that kept a limit may be none of them on a busy machine; nothing else is ever zero.
    assert all(ratio > 0 or (ratio == 0 and name.startswith("kept, ")) for name, ratio in printed["ratios"].items())
    return printed


@pytest.mark.slow
def test_the_ram_bench_copies_with_every_contender_and_prints_the_contract() -> None:
    """It compares the memory of both processes after every copy, and fails when they differ."""
    printed = printed_by("ram_throughput", "--mib", "8", "--rounds", "1")

    everywhere = {"raw", "ssl", "seal-only", "tls-1", "sealed-1", "sealed-2", "sealed-4"}
    populating = {"sealed-1-populating", "sealed-2-populating", "sealed-4-populating"}
    assert {run["contender"] for run in printed["runs"] if not run["cold"]} == everywhere
    assert {run["contender"] for run in printed["runs"] if run["cold"]} == everywhere | populating
    assert {(run["content"], run["cold"]) for run in printed["runs"]} == {
        ("incompressible", False),
        ("half-zero", False),
        ("incompressible", True),
    }
    assert all(run["seconds"] > 0 and run["source_cpu_s_per_gib"] > 0 for run in printed["runs"])
    assert "sealed-1 / raw, incompressible, populated" in printed["ratios"]
    assert "sealed-1-populating / sealed-1, incompressible, cold" in printed["ratios"]


@pytest.mark.slow
def test_the_bench_of_steps_accounts_for_all_of_a_threads_time_and_prints_the_contract() -> None:
    printed = printed_by("ram_steps", "--mib", "32", "--rounds", "1")

    for run in printed["runs"]:
        assert set(run["source"]) == {"look", "seal", "send", "all else"}
        assert set(run["destination"]) == {"take", "open", "digest", "all else"}
        for side in ("source", "destination"):
            in_steps = sum(step["cpu_s_per_gib"] for step in run[side].values())
            assert 0 < in_steps <= run[f"{side}_cpu_s_per_gib"] * 1.05
    assert sum(share for step, share in printed["ratios"].items() if step.endswith(", half-zero")) > 0.9


@pytest.mark.slow
def test_the_compression_bench_copies_with_every_contender_and_prints_the_contract() -> None:
    """It compares the memory of both processes, and the speed of the link with what was set, after every copy."""
    printed = printed_by(
        "compression", "--mib", "8", "--rounds", "1", "--contents", "incompressible,structs,text,resent"
    )

    runs = printed["runs"]
    assert {run["link"] for run in runs} == {"1 Gb/s", "unlimited"}
    assert {run["contender"] for run in runs if run["content"] == "structs"} == {"off", "on", "auto"}
    assert {run["contender"] for run in runs if run["content"] == "resent"} == {"off", "on", "auto, no cache", "auto"}
    assert all(sum(run["pages"].values()) >= 8 * 256 and run["wire_mib"] > 0 for run in runs)
    assert {run["pages"]["raw"] for run in runs if (run["content"], run["contender"]) == ("text", "on")} == {0}
    assert {
        "auto / off, structs, 1 Gb/s",
        "auto / off, text, 1 Gb/s",
        "auto / off, incompressible, unlimited",
        "auto / better of off and on, structs, unlimited",
        "auto / auto, no cache, resent, 1 Gb/s",
        "memory / wire, auto, resent, 1 Gb/s",
        "off / link, incompressible, 1 Gb/s",
    } <= set(printed["ratios"])


@pytest.mark.slow
def test_the_memory_bench_moves_a_guest_to_and_fro_and_prints_the_contract() -> None:
    """After every move the guest checks its memory, or the bench fails."""
    printed = printed_by("memory", "--cases", "8 GiB sparse", "--caches", "32", "--moves", "3")

    runs = printed["runs"]
    assert [(run["number"], run["role"], run["time"]) for run in runs] == [
        (number, role, "first" if number < 2 else "later") for number in range(3) for role in ("source", "destination")
    ]
    assert all(run["growth_mib"] >= run["growth_by_smaps_mib"] and run["before_mib"] > 0 for run in runs)
    assert all(run["looks"] > 1 and run["glances"] > 1 for run in runs)
    assert set(printed["ratios"]) == {
        f"{what} / allowed, {role}, {when}, 8 GiB sparse, cache 32 MiB"
        for what in ("growth", "over new")
        for role in ("source", "destination")
        for when in ("first", "later")
    }


@pytest.mark.slow
def test_the_pause_bench_tells_the_gap_that_the_guest_saw_in_every_move_and_prints_the_contract() -> None:
    printed = printed_by("pause", "--mib", "32", "--moves", "2", "--cases", "light,busy")

    runs = printed["runs"]
    assert [(run["name"], run["number"], run["outcome"]) for run in runs] == [
        (name, number, "moved") for name in ("light", "busy") for number in range(2)
    ]
    assert all(run["gap_ms"] >= run["steady_p50_ms"] > 0 for run in runs)
    assert {
        "kept, all",
        "moved, all",
        "gap p50 / wanted, light",
        "gap p99 / wanted, light",
        "forecast off, busy",
    } <= set(printed["ratios"])


@pytest.mark.slow
def test_the_convergence_bench_tells_how_each_policy_ends_and_prints_the_contract() -> None:
    """A guest that writes three times what the link carries: only those end well that do something about it."""
    printed = printed_by("convergence", "--mib", "24", "--link", "48", "--ratios", "3")

    ended = {run["policy"]: run["ended"] for run in printed["runs"]}
    assert ended["wait"] in {"will_not_converge", "timed_out_total"}
    assert {ended["force at the end"], ended["force at once"]} == {"moved"}
    assert all((run["gap_ms"] is not None) is (run["ended"] == "moved") for run in printed["runs"])
    throttled = {run["policy"]: run["throttle_percent"] for run in printed["runs"]}
    assert throttled["auto-converge"] > 0 == throttled["wait"]
    assert "wait, dirty 3 of the link: total / RAM once" in printed["ratios"]


@pytest.mark.slow
@pytest.mark.required
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler for the tracker and the guest")
def test_the_qemu_bench_moves_the_same_guest_in_every_way_and_prints_the_contract() -> None:
    """After every move the guest checks its memory, and its letters go on, or the bench fails."""
    modes = ["native", "native_tls", "native_tls_multifd2", "tracker_sealed_2", "tracker_tls_1", "stream_sealed_1"]
    chosen = ("--workloads", "dirty", "--modes", ",".join(modes), "--downtime-ms", "300")
    printed = printed_by("qemu_vs_native", "--mib", "64", "--reps", "1", *chosen)

    runs = printed["runs"]
    assert [(run["mode"], run["workload"], run["rep"]) for run in runs] == [(mode, "dirty", 0) for mode in modes]
    assert all(run["consistent"] for run in runs if not run["mode"].startswith("native"))
    assert all(run["gap_ms"] >= run["handover_ms"] > run["steady_p50_ms"] > 0 for run in runs)
    assert all(run["whole_ms"] >= run["total_ms"] >= run["bare_ms"] > 0 and run["cpu_s"] > 0 for run in runs)
    assert all(run["sent_bytes"] > 48 << 20 for run in runs)
    assert {run["mode"]: run["negotiated"] for run in runs if "negotiated" in run} == {
        f"{source}_{transport}_{streams}": {"transport": transport, "streams": streams, "page_source": source}
        for source, transport, streams in (("tracker", "sealed", 2), ("tracker", "tls", 1), ("stream", "sealed", 1))
    }
    assert {
        "total tracker_sealed_2 / native_tls, dirty, 300 ms",
        "pause tracker_sealed_2 / native_tls, dirty, 300 ms",
        "CPU stream_sealed_1 / native, dirty, 300 ms",
    } <= set(printed["ratios"])


def test_letters_that_are_missing_or_come_twice_are_found() -> None:
    """What the bench with QEMU rests upon: a guest that goes on in the middle of a move repeats or skips some."""
    assert fault_of(b"noise <READY>\nabcdefghijklmnopqrstuvwxyzabc") == ""
    assert fault_of(b"xyzab") == ""
    assert fault_of(b"abce") == "letter 3 of 4 is wrong: abce"
    assert fault_of(b"abccde") == "letter 3 of 6 is wrong: abccde"
    assert fault_of(b"abc\0d") == "letter 3 of 5 is wrong: abc?d"
    assert fault_of(b"<READY>\n") == "there are no letters"
