"""Draw the phase table of the migration protocol into ARCHITECTURE.md, between its two markers.

    python -m tools.phase_diagram           rewrite what lies between the markers
    python -m tools.phase_diagram --check   change nothing; fail when it is stale

The table in vmmigrate/wire/phases.py is the only home of legality. A diagram kept by hand would drift from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from vmmigrate.wire.phases import IF_IT_BREAKS, MAY_RUN, TERMINAL, TRANSITIONS, Kind, Phase, Role, next_phase

DOCUMENT = Path(__file__).resolve().parent.parent / "ARCHITECTURE.md"
BEGIN = "<!-- phases: drawn by `make docs` from vmmigrate/wire/phases.py; do not edit -->"
END = "<!-- phases: end -->"


def message_name(kind: Kind) -> str:
    """`ROUND_END` as `RoundEnd`, the name of its class."""
    return "".join(word.capitalize() for word in kind.name.split("_"))


def edges() -> Iterator[str]:
    """One arrow per (from, to, speaker), with everything that speaker may say there."""
    labels: dict[tuple[Phase, Phase, Role], list[str]] = {}
    for (phase, speaker, kind), following in TRANSITIONS.items():
        labels.setdefault((phase, following, speaker), []).append(message_name(kind))
    for (phase, following, speaker), names in labels.items():
        yield f"    {phase} --> {following}: {speaker} says {', '.join(names)}"


def diagram() -> list[str]:
    first = next(iter(Phase))
    ends = [f"    {phase} --> [*]" for phase in Phase if phase in TERMINAL]
    return ["```mermaid", "stateDiagram-v2", f"    [*] --> {first}", *edges(), *ends, "```"]


def common_messages() -> Iterator[str]:
    """The messages without an arrow of their own: legal in every live phase, or in all but a few."""
    drawn = {kind for _, _, kind in TRANSITIONS}
    live = [phase for phase in Phase if phase not in TERMINAL]
    for kind in (kind for kind in Kind if kind not in drawn):
        follows = {(phase, role): next_phase(phase, role, kind) for phase in live for role in Role}
        legal = {phase: following for (phase, _), following in follows.items() if following is not None}
        effect = "changes nothing" if all(a is b for a, b in legal.items()) else f"leads to {set(legal.values()).pop()}"
        except_in = [text for phase in live if (text := _forbidden(phase, follows))]
        yield f"{message_name(kind)} {effect}" + (f" (illegal in {', '.join(except_in)})" if except_in else "")


def _forbidden(phase: Phase, follows: Mapping[tuple[Phase, Role], Phase | None]) -> str:
    """Who may not say it in *phase*; empty when both may."""
    silent = [role for role in Role if follows[phase, role] is None]
    return str(phase) if len(silent) == len(Role) else "".join(f"{phase} for the {role}" for role in silent)


def table() -> Iterator[str]:
    """A row per run of neighbouring phases that share what may run and what a break means."""
    yield "| phase | may run the guest | if the link or a side dies here |"
    yield "| --- | --- | --- |"
    for (may_run, breaks), phases in groupby(Phase, key=lambda phase: (MAY_RUN[phase], IF_IT_BREAKS[phase])):
        yield f"| {', '.join(phases)} | {may_run} | {breaks} |"


def section() -> str:
    """Everything that stands between the markers."""
    common = f"From either side, in every live phase: {'; '.join(common_messages())}."
    return "\n".join(["", *diagram(), "", common, "", *table(), ""])


def redrawn(document: str) -> str:
    """*document* with the section as the table now has it.

    Raises: ValueError: the markers are not there exactly once each, in order.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"need exactly one line {BEGIN!r} and after it one line {END!r}")
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--check"}:
        print(__doc__, file=sys.stderr)
        return 2
    document = DOCUMENT.read_text(encoding="utf-8")
    wanted = redrawn(document)
    if "--check" in arguments:
        if document != wanted:
            print(f"{DOCUMENT.name}: the phase diagram is stale; run 'make docs'", file=sys.stderr)
        return int(document != wanted)
    if document != wanted:
        DOCUMENT.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
