"""Deliberate bugs, one at a time. A model that does not find one of them proves nothing about it.

A bug in the pure functions is patched into the real ones; a bug in what a daemon does around them is a switch of
`Engine`. Each names the rule of design 4.2 that it breaks, and the failures under which it shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

from tools.model.explore import Explorer, Report
from tools.model.machine import Engine
from tools.model.promises import HARM, Promise
from tools.model.world import SCENARIOS, Failure
from vmmigrate.engine import journal_format
from vmmigrate.errors import JournalError
from vmmigrate.ownership import records as r
from vmmigrate.ownership import recovery, rules, state
from vmmigrate.ownership.recovery import Step
from vmmigrate.ownership.rules import Answer, Decision
from vmmigrate.ownership.state import Holding, Incoming, Outgoing, Ownership

F = Failure
DESIGNED = Engine()
# No harm yet, as far as the model goes: two journals that make their hosts the owner, a guest that runs without one.
EARLY = frozenset({Promise.ONE_OWNS, Promise.OWNER_RUNS})
OPERATOR = frozenset({F.SILENCE, F.OPERATOR})
Patch = Callable[[], AbstractContextManager[None]]
Decide = Callable[[Ownership, Any], Decision]


@dataclass(frozen=True)
class Mutation:
    """A bug, and where to look for it. `shows_as`: what it must break; everything else is let pass. `today`: a daemon
    did so when the model was written."""

    name: str
    rule: str
    failures: frozenset[Failure]
    patches: tuple[Patch, ...] = ()
    engine: Engine = DESIGNED
    chain: str = "ab"
    depth: int = 1
    today: bool = False
    shows_as: frozenset[Promise] = HARM

    def hunt(self, seconds: float) -> Report:
        """Explore with the bug in place, with no failures but those under which it shows."""
        with ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch())
            scenario = SCENARIOS[self.chain]
            explorer = Explorer(
                scenario,
                self.depth,
                engine=self.engine,
                seconds=seconds,
                allowed=self.failures,
                kept=self.shows_as,
            )
            # A journal put back with its old id is outside of the promise that everything ends.
            return explorer.run(liveness=F.JOURNAL_COPIED not in self.failures)

    def without(self, seconds: float) -> Report:
        """The same hunt in the real thing."""
        return replace(self, patches=(), engine=DESIGNED, shows_as=frozenset(Promise)).hunt(seconds)


# --------------------------------------------------------------------------- how to patch


@contextlib.contextmanager
def _entry(table: Any, key: Any, value: Any) -> Iterator[None]:
    entries = cast("MutableMapping[Any, Any]", table)
    missing = object()
    before = entries.get(key, missing)
    entries[key] = value
    try:
        yield
    finally:
        if before is missing:
            del entries[key]
        else:
            entries[key] = before


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _decides(event: type, function: Decide) -> Patch:
    return lambda: _entry(rules._DECIDE, event, function)


def _steps(stage: Incoming, record: type[r.Record], following: Incoming) -> Patch:
    return lambda: _entry(state.INCOMING_STEPS, (stage, record), following)


def _at_stage(stage: Incoming, real: Decide, stand_in: Incoming) -> Decide:
    """*real*, for which a migration in *stage* looks like one in *stand_in*."""

    def decide(known: Ownership, event: Any) -> Decision:
        incoming = known.incoming.get(event.migration)
        if incoming is not None and incoming.stage is stage:
            changed = replace(incoming, stage=stand_in)
            known = replace(known, incoming={**known.incoming, event.migration: changed})
        return real(known, event)

    return decide


def _evidence(change: Callable[[Ownership, rules.Evidence], rules.Evidence]) -> Patch:
    """Evidence that is read as something else."""
    return _decides(rules.Evidence, lambda known, event: rules._evidence(known, change(known, event)))


# --------------------------------------------------------------------------- bugs in the rules


def _answers_before_it_is_durable(known: Ownership, event: Any) -> Decision:
    return Decision(answer=rules._settle(known, event).answer)


def _answers_from_ownership(known: Ownership, event: Any) -> Decision:
    incoming = known.incoming.get(event.migration)
    owner = known.instances.get(incoming.instance) if incoming else None
    if incoming is None or owner is None or incoming.stage is Incoming.PREPARED:
        return rules._settle(known, event)
    holds = owner.holding in {Holding.HELD, Holding.ACQUIRED}
    return Decision(answer=Answer.STARTED if holds else Answer.REFUSED)


def _answers_refused_without_prepared(known: Ownership, event: Any) -> Decision:
    decision = rules._settle(known, event)
    return replace(decision, answer=Answer.REFUSED) if decision.answer is Answer.UNKNOWN else decision


def _from_the_journal_asked(known: Ownership, event: rules.Evidence) -> rules.Evidence:
    released = known.outgoing[event.migration].released if event.migration in known.outgoing else None
    return replace(event, journal_id=released.destination_journal) if released else event


def _unknown_counts(known: Ownership, event: rules.Evidence) -> rules.Evidence:
    if event.answer is not Answer.UNKNOWN:
        return event
    return replace(_from_the_journal_asked(known, event), answer=Answer.REFUSED)


def _pending_counts(known: Ownership, event: rules.Evidence) -> rules.Evidence:
    return replace(event, answer=Answer.STARTED) if event.answer is Answer.PENDING else event


def _of_whatever_is_in_doubt(known: Ownership, event: rules.Evidence) -> rules.Evidence:
    """The evidence is taken for the migration that is in doubt, whichever it speaks of."""
    in_doubt = [m for m, outgoing in known.outgoing.items() if outgoing.stage is Outgoing.RELEASED]
    return replace(event, migration=in_doubt[-1]) if in_doubt else event


def _loss_apart(known: Ownership, event: Any) -> Decision:
    """As it was before the model found it: `reclaimed`, and then `lost` as a record of its own."""
    decision = rules._evidence(known, event)
    outgoing = known.outgoing.get(event.migration)
    owner = known.instances.get(outgoing.instance) if outgoing else None
    if owner is None or owner.guest is not None or not any(isinstance(x, r.Reclaimed) for x in decision.records):
        return decision
    return replace(decision, records=(*decision.records, r.Lost(owner.instance, "guest_lost")))


def _reclaimed_without_guest(known: Ownership, record: Any) -> Ownership:
    after = state._outgoing_ownership(known, record)
    owner = after.instances[after.outgoing[record.migration].instance]
    if owner.holding is not Holding.LOST:
        return after
    return state._with_instance(after, replace(owner, holding=Holding.HELD))


def _receives_in_doubt(known: Ownership, event: Any) -> Decision:
    return Decision((event.reserved,))


def _never_superseded(known: Ownership, instance: str, epoch: Any) -> bool:
    return False


def _nobody_to_tell_after_me(known: Ownership) -> tuple[rules.Notice, ...]:
    own = [m for m, outgoing in known.outgoing.items() if outgoing.stage is Outgoing.RESOLVED]
    return tuple(notice for notice in _NOTICES(known) if notice.migration in own)


_NOTICES = rules.notices
_TO_DESTINATION = rules._resolve_destination


# --------------------------------------------------------------------------- bugs in recovery and in the journal


def _resumes_in_doubt(*arguments: Any) -> Iterator[recovery.RecoveryStep]:
    for step in _INSTANCE_STEPS(*arguments):
        yield replace(step, step=Step.RUN) if step.step is Step.SETTLE else step


_INSTANCE_STEPS = recovery._instance_steps


def _trusts_every_journal(known: Ownership, guests: Any, newest_record: int, *more: Any) -> Any:
    return _PLAN(known, guests, 1 << 62, *more)


_PLAN = recovery.plan


def _lenient(raw: bytes, position: int, number: int, name: str) -> tuple[dict[str, Any], int] | None:
    """Whatever cannot be read is taken for the torn end."""
    try:
        return _BODY_AT(raw, position, number, name)
    except JournalError:
        return None


_BODY_AT = journal_format._body_at


# --------------------------------------------------------------------------- the list


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "pause for handoff ends with the daemon", "1", frozenset({F.DAEMON_CRASH}), engine=Engine(pause_survives=False)
    ),
    Mutation(
        "vCPUs run before `started`",
        "2",
        frozenset({F.DAEMON_CRASH, F.GUEST_CRASH}),
        engine=Engine(run_after_started=False),
        depth=2,
    ),
    Mutation("`started` before disks are open", "2", frozenset({F.START}), engine=Engine(open_first=False)),
    Mutation(
        "acquire after refuse",
        "3",
        frozenset({F.SILENCE}),
        (
            _decides(rules.Acquire, _at_stage(Incoming.REFUSED, rules._acquire, Incoming.PREPARED)),
            _steps(Incoming.REFUSED, r.Acquired, Incoming.ACQUIRED),
        ),
    ),
    Mutation(
        "`started` after `returned`",
        "3",
        frozenset({F.START}),
        (
            _decides(rules.Start, _at_stage(Incoming.RETURNED, rules._start, Incoming.ACQUIRED)),
            _steps(Incoming.RETURNED, r.Started, Incoming.STARTED),
        ),
        shows_as=EARLY,
    ),
    Mutation(
        "refuse after acquire",
        "3",
        frozenset({F.SILENCE}),
        (
            _decides(rules.Settle, _at_stage(Incoming.ACQUIRED, rules._settle, Incoming.PREPARED)),
            _steps(Incoming.ACQUIRED, r.Refused, Incoming.REFUSED),
        ),
        shows_as=EARLY,
    ),
    Mutation(
        "refused is answered before it is durable",
        "3",
        frozenset({F.SILENCE}),
        (_decides(rules.Settle, _answers_before_it_is_durable),),
    ),
    Mutation("no fsync before acting", "3", frozenset({F.HOST_CRASH}), engine=Engine(fsync=False)),
    Mutation("a failed fsync does not poison", "4", frozenset({F.FSYNC}), engine=Engine(poison=False)),
    Mutation(
        "records acted upon from the page cache",
        "4",
        frozenset({F.FSYNC, F.HOST_CRASH}),
        engine=Engine(rewrite=False),
        depth=2,
    ),
    Mutation(
        "torn tail too lenient",
        "4",
        frozenset({F.JOURNAL_DAMAGED}),
        (lambda: _attribute(journal_format, "_body_at", _lenient),),
        chain="abc",
    ),
    Mutation("resume on failure, without evidence", "5", frozenset({F.CUT}), engine=Engine(waits_for_evidence=False)),
    Mutation(
        "resume at the restart, without evidence",
        "5",
        frozenset({F.DAEMON_CRASH}),
        (lambda: _attribute(recovery, "_instance_steps", _resumes_in_doubt),),
    ),
    Mutation("404 or unknown as evidence", "5", frozenset({F.JOURNAL_LOST}), (_evidence(_unknown_counts),)),
    Mutation(
        "evidence of an older M",
        "5",
        frozenset({F.SILENCE, F.DUPLICATE}),
        (_evidence(_of_whatever_is_in_doubt),),
        chain="again",
        depth=2,
    ),
    Mutation(
        "the journal's id is not compared",
        "6",
        frozenset({F.JOURNAL_RESTORED}),
        (_evidence(_from_the_journal_asked),),
        chain="abc",
    ),
    Mutation(
        "an M without `prepared` answers refused",
        "6",
        frozenset({F.JOURNAL_COPIED}),
        (_decides(rules.Settle, _answers_refused_without_prepared),),
    ),
    Mutation(
        "the answer is derived from ownership",
        "6",
        frozenset({F.CUT}),
        (_decides(rules.Settle, _answers_from_ownership),),
        chain="abc",
    ),
    Mutation(
        "settle does not look for the guest after a restart",
        "6",
        frozenset({F.JOURNAL_COPIED}),
        engine=Engine(sees_guests=False),
        today=True,
    ),
    Mutation("free on `acquired`", "7", frozenset({F.SILENCE, F.START}), (_evidence(_pending_counts),), depth=2),
    Mutation(
        "run before `reclaimed`", "7", frozenset({F.SILENCE}), engine=Engine(reclaims_first=False), shows_as=EARLY
    ),
    Mutation(
        "the guest's memory of the journal is ignored",
        "7",
        frozenset({F.JOURNAL_RESTORED}),
        (lambda: _attribute(recovery, "plan", _trusts_every_journal),),
    ),
    Mutation(
        "the Handoff leaves before the guest is told of `released`",
        "7",
        frozenset({F.JOURNAL_RESTORED}),
        engine=Engine(note_before_handoff=False),
        today=True,
    ),
    Mutation(
        "a restarted source in doubt does not tell its guest",
        "7",
        frozenset({F.FSYNC, F.OPERATOR, F.JOURNAL_RESTORED}),
        engine=Engine(notes_at_restart=False),
        depth=3,
        today=True,
    ),
    Mutation(
        "a loss that is a record of its own, after `reclaimed`",
        "7",
        frozenset({F.HOST_CRASH, F.FSYNC}),
        (_decides(rules.Evidence, _loss_apart), lambda: _entry(state._APPLY, r.Reclaimed, _reclaimed_without_guest)),
        depth=2,
    ),
    Mutation(
        "`superseded` is not durable",
        "8",
        OPERATOR,
        engine=Engine(writes_superseded=False),
        depth=2,
    ),
    Mutation(
        "a superseded guest runs on",
        "8",
        OPERATOR,
        engine=Engine(pauses_superseded=False),
        depth=2,
    ),
    Mutation(
        "a superseded epoch may run",
        "8",
        OPERATOR,
        (lambda: _attribute(Ownership, "is_superseded", _never_superseded),),
        depth=2,
    ),
    Mutation(
        "later hosts of the chain are not told",
        "8",
        OPERATOR,
        (lambda: _attribute(rules, "notices", _nobody_to_tell_after_me),),
        chain="abc",
        depth=2,
    ),
    Mutation(
        "resolve for the destination wins against a verdict",
        "8",
        OPERATOR,
        (
            _decides(
                rules.ResolveDestination, _at_stage(Incoming.REFUSED, rules._resolve_destination, Incoming.PREPARED)
            ),
            _steps(Incoming.REFUSED, r.Acquired, Incoming.ACQUIRED),
        ),
        depth=2,
    ),
    Mutation(
        "undo is journalled before the guest runs",
        "9",
        frozenset({F.DAEMON_CRASH}),
        engine=Engine(run_before_resumed=False),
        chain="again",
        depth=2,
    ),
    Mutation(
        "a host in doubt becomes the destination",
        "12",
        frozenset({F.SILENCE}),
        (_decides(rules.Reserve, _receives_in_doubt),),
        chain="aba",
    ),
)
