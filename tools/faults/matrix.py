"""What trials showed, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tools.faults.relay import Boundary
from tools.faults.runner import Campaign
from tools.faults.trial import Fault, Result

_LEGEND = (
    "owner afterwards: S source, D destination, L lost with its process; . not reached, ! promise broken, ? not tried"
)


def line_of(result: Result) -> str:
    """One trial on one line, and a line for each promise that it broke."""
    verdict, trial = result.verdict, result.trial
    what = "no fault" if trial.boundary is None else f"{trial.fault.value:17} {trial.boundary!s:14}"
    reached = "" if result.reached or trial.boundary is None else " (not reached)"
    problems = "".join(f"\n    BROKEN: {problem}" for problem in verdict.problems)
    owner = verdict.owner or "nobody"
    return f"{what:32} {verdict.outcome:11} owner {owner:11} {result.seconds:5.1f} s{reached}{problems}"


def matrix(campaign: Campaign) -> str:
    """A row for each boundary, a column for each fault; then how often each ended how; then what was broken."""
    faults = [fault for fault in Fault if fault in campaign.faults]
    cells = {(result.trial.boundary, result.trial.fault): _cell(result) for result in campaign.results}
    boundaries = _ordered(result.trial.boundary for result in campaign.results)
    lines = [_LEGEND, f"{'before the record':17} " + " ".join(fault.value for fault in faults)]
    for boundary in boundaries:
        marks = (f"{cells.get((boundary, fault), '?'):^{len(fault.value)}}" for fault in faults)
        lines.append(f"{boundary!s:17} " + " ".join(marks).rstrip())
    lines += ["", f"{'fault':17} {'trials':>6} {'source':>7} {'dest':>5} {'lost':>5} {'broken':>7} {'seconds':>8}"]
    lines += [_sum(fault, [r for r in campaign.results if r.trial.fault is fault]) for fault in faults]
    lines += [line_of(result) for result in campaign.broken]
    lines.append(f"{len(campaign.results)} trials, {len(campaign.broken)} broken, {campaign.left_out} left out")
    return "\n".join(lines)


def _cell(result: Result) -> str:
    if result.verdict.problems:
        return "!"
    if not result.reached:
        return "."
    return "L" if result.verdict.owner is None else result.verdict.owner[0].upper()


def _ordered(boundaries: Iterable[Boundary | None]) -> list[Boundary]:
    return sorted({b for b in boundaries if b is not None}, key=lambda b: (b.side, b.number))


def _sum(fault: Fault, results: list[Result]) -> str:
    owners = [result.verdict.owner for result in results]
    broken = sum(bool(result.verdict.problems) for result in results)
    seconds = sum(result.seconds for result in results)
    return (
        f"{fault.value:17} {len(results):6} {owners.count('source'):7} {owners.count('destination'):5}"
        f" {owners.count(None):5} {broken:7} {seconds:8.1f}"
    )


def to_plain(campaign: Campaign) -> dict[str, Any]:
    """The same for programs."""
    return {
        "name": "faults",
        "trials": len(campaign.results),
        "broken": len(campaign.broken),
        "left_out": campaign.left_out,
        "runs": [
            {
                "fault": result.trial.fault.value,
                "boundary": str(result.trial.boundary) if result.trial.boundary else None,
                "reached": result.reached,
                "owner": result.verdict.owner,
                "outcome": result.verdict.outcome,
                "problems": list(result.verdict.problems),
                "seconds": round(result.seconds, 3),
            }
            for result in [*campaign.calm, *campaign.results]
        ],
    }
