"""How a demonstration is told: to people line by line, or not at all when its outcome is one JSON document."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from vmmigrate.cli.moving import OnProgress
from vmmigrate.cli.progress import line_progress, terminal_progress
from vmmigrate.demo.stage import Say


@dataclass(frozen=True)
class Teller:
    """`say` a line, and show the progress of a migration."""

    say: Say
    progress: Callable[[], AbstractContextManager[OnProgress]]


def make_teller(as_json: bool) -> Teller:
    if as_json:
        return Teller(lambda line: None, lambda: line_progress(lambda line: None))
    say = partial(print, flush=True)
    if sys.stderr.isatty():
        return Teller(say, lambda: terminal_progress(sys.stderr))
    return Teller(say, lambda: line_progress(lambda line: say(f"  {line}")))
