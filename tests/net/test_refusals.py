"""A flood of refusals fills no disk."""

from __future__ import annotations

from structlog.testing import capture_logs

from vmmigrate.errors import IdentityError
from vmmigrate.net.refusals import MOST, WINDOW_S, RefusalLog


def test_a_flood_is_said_up_to_a_point_and_then_counted() -> None:
    now = 0.0
    refused = RefusalLog("door.refused", clock=lambda: now)
    with capture_logs() as events:
        for _ in range(MOST + 7):
            refused("10.0.0.9:4711", IdentityError("no", code="wrong_role"))
        assert [event["code"] for event in events] == ["wrong_role"] * MOST

        now = WINDOW_S
        refused("10.0.0.9:4712", IdentityError("no", code="wrong_host"))

    assert [(event.get("number"), event.get("code")) for event in events[MOST:]] == [(7, None), (None, "wrong_host")]


def test_refusals_that_are_few_are_all_said() -> None:
    now = 0.0
    refused = RefusalLog("door.refused", clock=lambda: now)
    with capture_logs() as events:
        for _ in range(3 * MOST):
            now += 2 * WINDOW_S / MOST
            refused("10.0.0.9:4711", IdentityError("no", code="wrong_role"))

    assert len(events) == 3 * MOST
    assert {event["log_level"] for event in events} == {"info"}
