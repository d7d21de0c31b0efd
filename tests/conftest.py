"""What holds for every test: how many examples, and which tests may not be skipped.

A skip is how a test says that this machine lacks something. Unwatched it is also how a whole component goes untested
without anybody noticing. So under `make check` (VMM_CHECK=1) a test marked `required` that skips, fails; and so does a
whole module that skips while it is imported, since its marks were never seen. `make test` lets both pass. pytest's
`-ra` prints every skip with its reason either way.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# No deadline per example: on a busy machine of two cores it tells about the neighbours, not about the code.
settings.register_profile("house", deadline=None)
settings.register_profile("long", settings.get_profile("house"), max_examples=5000)
settings.load_profile("long" if os.environ.get("VMM_LONG") else "house")


def skips_are_watched() -> bool:
    return os.environ.get("VMM_CHECK") == "1"


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason given to `skip`, which pytest keeps as (file, line, text)."""
    longrepr = report.longrepr
    text = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # first in, so last out: after pytest's own hook has told xfail from skip
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    is_skip = report.skipped and not hasattr(report, "wasxfail")
    if is_skip and skips_are_watched() and item.get_closest_marker("required"):
        reason = _skip_reason(report)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} is required and may not be skipped here: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and skips_are_watched():
        reason = _skip_reason(report)
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped as a whole, so nobody knows what in it is required: {reason}"
    return report
