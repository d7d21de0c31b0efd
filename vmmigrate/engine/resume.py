"""Going on after a cut link: both ends prove that they are the two that were cut off, and count what has arrived.

The proof is an HMAC by keys of the session that was cut; only its two ends could derive them. The new session has a
number and secrets of its own, so no key and no bulk stream of the old one is of use in it. A page counts as arrived
only when its whole record has landed, and that is counted only after every receiver thread was joined.
"""

from __future__ import annotations

import hmac
import secrets
import zlib
from dataclasses import replace

import numpy as np

from vmmigrate.engine.agreement import Agreed
from vmmigrate.errors import IdentityError, RemoteProtocolError, UsageError
from vmmigrate.memory import PageBitmap
from vmmigrate.net.receiving import Landing
from vmmigrate.net.secrets import RANDOM_BYTES, SessionSecrets, proof
from vmmigrate.wire import messages as m

_BY_DESTINATION = "resume destination"
_BY_SOURCE = "resume source"


def ask_to_resume(cut: SessionSecrets) -> m.Resume:
    """What the destination says to go on after the session of *cut*."""
    random = secrets.token_bytes(RANDOM_BYTES)
    context = cut.context
    return m.Resume(context.migration_id, context.session_number, random, proof(cut.key(_BY_DESTINATION), random))


def accept_resume(asked: m.Resume, agreed: Agreed, bulk_port: int) -> tuple[Agreed, m.Resumed]:
    """What the source answers, and what is agreed upon from then on.

    Raises: IdentityError `resume_unproven`.
    """
    cut = agreed.secrets
    expected = proof(cut.key(_BY_DESTINATION), asked.random)
    if asked.session_number != cut.context.session_number or not hmac.compare_digest(asked.proof, expected):
        raise IdentityError("that is not the destination that was cut off", code="resume_unproven")
    random, number = secrets.token_bytes(RANDOM_BYTES), cut.context.session_number + 1
    answer = m.Resumed(number, bulk_port, random, proof(cut.key(_BY_SOURCE), asked.random, random))
    select = replace(agreed.select, session_number=number, bulk_port=bulk_port, random=random)
    return replace(agreed, select=select, secrets=_next(cut, asked.random, random)), answer


def check_resumed(answer: m.Resumed, asked: m.Resume, cut: SessionSecrets) -> SessionSecrets:
    """The secrets of the new session, as the destination derives them.

    Raises: IdentityError `resume_unproven`.
    """
    expected = proof(cut.key(_BY_SOURCE), asked.random, answer.random)
    if answer.session_number != cut.context.session_number + 1 or not hmac.compare_digest(answer.proof, expected):
        raise IdentityError("that is not the source that was cut off", code="resume_unproven")
    return _next(cut, asked.random, answer.random)


def _next(cut: SessionSecrets, destination_random: bytes, source_random: bytes) -> SessionSecrets:
    context = replace(cut.context, session_number=cut.context.session_number + 1)
    return SessionSecrets(context, destination_random, source_random)


def tell_applied(landing: Landing, round_number: int) -> m.Applied:
    """What the destination holds: rounds up to *round_number*, and what has landed since the source was last told.
    Threads are joined."""
    return m.Applied(round_number, zlib.compress(np.packbits(landing.fresh, bitorder="little").tobytes(), 1))


def read_applied(applied: m.Applied, pages: int) -> PageBitmap:
    """The pages that have landed since the destination told last.

    Raises: RemoteProtocolError `bad_message`: not deflated, or not a bitmap of *pages* pages.
    """
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(applied.pages, (pages + 7) // 8 + 1)
        return PageBitmap.from_bytes(pages, raw)
    except (zlib.error, UsageError) as exc:
        raise RemoteProtocolError(f"APPLIED: {exc}", code="bad_message") from None
