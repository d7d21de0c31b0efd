"""Guest time across a move: what the source reads, and what the destination makes of it.

A guest's clocks hang on host clocks that differ between hosts. The source reads its monotonic clock (`hrtime`), its
wall clock and the guest's counters at one moment; the destination reads its own two clocks and moves the guest's
origin so that the guest sees time pass exactly as long as the wall clocks say. That assumes wall clocks kept in step
(NTP). A destination behind its source would turn time back; the difference is then taken as zero and reported.

Time is imported before devices, because their timers are normalised against `boot_hrtime`.

Source: Propolis, lib/propolis/src/vmm/time.rs (facts in propolis.md 4.8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vmmigrate.errors import PayloadError

NS_PER_S = 1_000_000_000
I64_MIN, I64_MAX = -(1 << 63), (1 << 63) - 1
U64_MAX, U128_MAX = (1 << 64) - 1, (1 << 128) - 1

_BOUNDS: Mapping[str, tuple[int, int]] = {
    "guest_freq": (0, U64_MAX),
    "guest_tsc": (0, U64_MAX),
    "hrtime": (I64_MIN, I64_MAX),
    "hres_sec": (0, U64_MAX),
    "hres_ns": (0, U64_MAX),
    "boot_hrtime": (I64_MIN, I64_MAX),
}


@dataclass(frozen=True, slots=True)
class TimeData:
    """The clocks of a guest and of its host at one moment.

    Attributes:
        guest_freq: Guest time stamp counter, Hz.
        guest_tsc: Its value.
        hrtime: Host monotonic clock, ns.
        hres_sec: Host wall clock, whole seconds since 1970.
        hres_ns: Host wall clock, ns within the second.
        boot_hrtime: Host monotonic clock when the guest booted, ns; negative when it booted before this host.
    """

    guest_freq: int
    guest_tsc: int
    hrtime: int
    hres_sec: int
    hres_ns: int
    boot_hrtime: int

    def to_map(self) -> dict[str, int]:
        """The plain map that crosses the wire."""
        return asdict(self)

    @classmethod
    def from_map(cls, tree: Any) -> TimeData:
        """Decode the wire's map.

        Raises:
            PayloadError: `time_fields`: not exactly these fields, each an integer within its bounds.
        """
        if not isinstance(tree, Mapping) or set(tree) != set(_BOUNDS):
            raise _error("fields", f"time needs exactly the fields {', '.join(_BOUNDS)}")
        for name, (low, high) in _BOUNDS.items():
            value = tree[name]
            if type(value) is not int or not low <= value <= high:
                raise _error("fields", f"time field {name} must be an integer from {low} to {high}")
        return cls(**{name: tree[name] for name in _BOUNDS})


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What the destination sets.

    Attributes:
        time: The guest's clocks on this host.
        clamped: This host's wall clock was behind the source's, so no time passed for the guest.
        delta_ns: Time that passed between export and import as the guest will see it.
    """

    time: TimeData
    clamped: bool
    delta_ns: int


def adjust(time: TimeData, hrtime_ns: int, wall_sec: int, wall_ns: int) -> Adjustment:
    """Carry *time* over to a host whose clocks read *hrtime_ns* and (*wall_sec*, *wall_ns*).

    Raises:
        PayloadError: `time_freq_zero`, `time_wall_ns`, `time_hrtime_negative`, `time_delta_overflow`,
            `time_uptime_overflow`, `time_uptime_negative`, `time_uptime_delta_overflow`, `time_boot_underflow`,
            `time_tsc_overflow`. Nothing was changed anywhere.
    """
    _check_clocks(time, hrtime_ns, wall_ns)
    passed_ns = wall_sec * NS_PER_S + wall_ns - (time.hres_sec * NS_PER_S + time.hres_ns)
    delta_ns = max(passed_ns, 0)
    if delta_ns > I64_MAX:
        raise _error("delta_overflow", f"{delta_ns} ns between the two wall clocks do not fit 64 bits")
    adjusted = TimeData(
        guest_freq=time.guest_freq,
        guest_tsc=_moved_tsc(time, delta_ns),
        hrtime=hrtime_ns,
        hres_sec=wall_sec,
        hres_ns=wall_ns,
        boot_hrtime=_moved_boot(time, hrtime_ns, delta_ns),
    )
    return Adjustment(adjusted, clamped=passed_ns < 0, delta_ns=delta_ns)


def _check_clocks(time: TimeData, hrtime_ns: int, wall_ns: int) -> None:
    if time.guest_freq == 0:
        raise _error("freq_zero", "the guest's counter has frequency 0")
    for whose, ns in (("source", time.hres_ns), ("destination", wall_ns)):
        if not 0 <= ns < NS_PER_S:
            raise _error("wall_ns", f"wall clock of the {whose}: {ns} ns within a second")
    if hrtime_ns < 0:
        raise _error("hrtime_negative", f"monotonic clock of the destination reads {hrtime_ns} ns")


def _moved_boot(time: TimeData, hrtime_ns: int, delta_ns: int) -> int:
    uptime_ns = time.hrtime - time.boot_hrtime
    if not I64_MIN <= uptime_ns <= I64_MAX:
        raise _error("uptime_overflow", f"uptime {time.hrtime} - {time.boot_hrtime} ns does not fit 64 bits")
    if uptime_ns < 0:
        raise _error("uptime_negative", f"the guest booted {-uptime_ns} ns after its time was read")
    if uptime_ns + delta_ns > I64_MAX:
        raise _error("uptime_delta_overflow", f"uptime {uptime_ns} + {delta_ns} ns does not fit 64 bits")
    boot_hrtime = hrtime_ns - (uptime_ns + delta_ns)
    if boot_hrtime < I64_MIN:
        raise _error("boot_underflow", f"boot time {boot_hrtime} ns does not fit 64 bits")
    return boot_hrtime


def _moved_tsc(time: TimeData, delta_ns: int) -> int:
    """The counter after *delta_ns*; it wraps at 64 bits as the real one does, the distance itself must not."""
    product = delta_ns * time.guest_freq
    if product > U128_MAX or product // NS_PER_S > U64_MAX:
        raise _error("tsc_overflow", f"{delta_ns} ns at {time.guest_freq} Hz do not fit a 64-bit counter")
    return (time.guest_tsc + product // NS_PER_S) & U64_MAX


def _error(code: str, text: str) -> PayloadError:
    return PayloadError(text, code=f"time_{code}")


def since_boot(booted_ns: int, monotonic_ns: int, wall_ns: int) -> TimeData:
    """Of a guest whose clocks travel elsewhere: its counter counts nanoseconds since it booted.

    Args:
        booted_ns: By the monotonic clock of this host, of which *monotonic_ns* is now; *wall_ns*: what time that is.
    """
    booted_ns = min(booted_ns, monotonic_ns)
    return TimeData(
        guest_freq=NS_PER_S,
        guest_tsc=monotonic_ns - booted_ns,
        hrtime=monotonic_ns,
        hres_sec=wall_ns // NS_PER_S,
        hres_ns=wall_ns % NS_PER_S,
        boot_hrtime=booted_ns,
    )
