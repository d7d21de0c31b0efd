"""The daemon's log on stderr: JSON lines for programs, columns for a terminal."""

from __future__ import annotations

import sys
from typing import Any, Final

import structlog

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure_logs(level: str) -> None:
    """For the whole process. stdout stays free for what programs read."""
    terminal = sys.stderr.isatty()
    ending: list[Any] = [structlog.dev.ConsoleRenderer()]
    if not terminal:
        ending = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(default=str)]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *ending,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # stderr as it is then
    )
