"""What this host lets in: rules that need the host itself to answer. All problems are reported at once.

A peer's spec is not trusted. Everything that it would make this host open must stand in the host's allow-lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vmmigrate.daemon.config import Allow
from vmmigrate.errors import SpecBuildError, SpecCreatableError
from vmmigrate.hypervisor import headroom
from vmmigrate.spec.chain import AnySpec
from vmmigrate.spec.openings import AllowLists, refusals


def check_admissible(spec: AnySpec, allow: Allow, needed_bytes: int) -> None:
    """Whether this host may open what *spec* names, and has the memory.

    Args:
        needed_bytes: RAM that the guest is known to touch.

    Raises:
        SpecCreatableError: `host_refuses`, with every problem in `details["problems"]`.
    """
    refused = refusals(spec, _allow_lists(allow), _behind_links)
    problems = [f"{refusal.opening.component}: {refusal.message}" for refusal in refused]
    problems += _memory_problems(needed_bytes)
    if problems:
        raise SpecCreatableError(
            "this host refuses: " + "; ".join(problems), code="host_refuses", details={"problems": problems}
        )


def check_realisable(problems: Sequence[str]) -> None:
    """Whether the hypervisor of this host can make the machine, with the program that was asked for.

    Args:
        problems: As `Hypervisor.problems` tells them.

    Raises:
        SpecBuildError: `program_invalid`, when nothing but the program is wrong. SpecCreatableError: with every problem
            in `details["problems"]`.
    """
    if not problems:
        return
    if all(problem.startswith("program ") for problem in problems):
        raise SpecBuildError("; ".join(problems), code="program_invalid")
    text = "this host cannot make the machine: " + "; ".join(problems)
    raise SpecCreatableError(text, details={"problems": list(problems)})


def _allow_lists(allow: Allow) -> AllowLists:
    return AllowLists([_behind_links(str(root)) for root in allow.paths], allow.hosts, allow.interfaces)


def _behind_links(path: str) -> str:
    return str(Path(path).resolve())


def _memory_problems(needed_bytes: int) -> Iterator[str]:
    available = headroom.available_bytes()
    if needed_bytes + headroom.RESERVE_BYTES > available:
        yield f"the guest uses {needed_bytes >> 20} MiB of RAM, {available >> 20} MiB are available"
