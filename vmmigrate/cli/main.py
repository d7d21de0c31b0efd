"""The entry point: `vmmigrate`.

Commands are named here and imported when they run, so that `--help` needs neither trio nor pydantic. `demo` lies above
this layer; naming it by a text keeps the command line from depending on it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from cyclopts import App, CycloptsError

import vmmigrate
from vmmigrate.cli.exits import Exit, exit_of_error
from vmmigrate.cli.output import complain, print_error
from vmmigrate.errors import UsageError, VmMigrateError

_EPILOGUE: Final = (
    "Exit codes: 0 ok, or moved; 2 usage; 3 refused, nothing was touched; 4 failed, 5 cancelled, 6 timed out:"
    " the source is as before; 7 outcome unknown; 8 guest lost."
)

# Where each command is, and its line in the list of commands; its own help is its docstring.
_COMMANDS: Final = {
    "migrate": ("vmmigrate.cli.commands.migrate:migrate", "Move a running guest from one host to another."),
    "plan": ("vmmigrate.cli.commands.plan:plan", "Foretell a migration: measure, forecast, and move nothing."),
    "migration": ("vmmigrate.cli.commands.migration:app", "Look at migrations, adjust and cancel them."),
    "vm": ("vmmigrate.cli.commands.vm:app", "Make, run and look at instances on one host."),
    "daemon": ("vmmigrate.cli.commands.daemon:daemon", "Run the daemon of a host."),
    "journal": ("vmmigrate.cli.commands.journal:app", "Look into a daemon's journal, and check it."),
    "pki": ("vmmigrate.cli.commands.pki:app", "Certificates for small sites."),
    "spec": ("vmmigrate.cli.commands.spec:app", "Check, convert, build, negotiate and amend instance specs."),
    "demo": ("vmmigrate.demo.command:demo", "Migrate a guest between two daemons on this machine."),
}


def make_app(arguments: Sequence[str]) -> App:
    app = App(
        name="vmmigrate",
        version=vmmigrate.__version__,
        help="Move running virtual machines between hosts.",
        help_epilogue=_EPILOGUE,
        help_format="plaintext",  # markdown would double the time that help takes
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    for name, (path, text) in _COMMANDS.items():
        # A text given here takes the docstring's place.
        app.command(path, name=name, help=None if name in arguments else text)
    return app


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code. Never raises for what we can name: that is one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    as_json = _wants_json(arguments)
    try:
        return int(make_app(arguments)(arguments) or Exit.OK)
    except CycloptsError as exc:
        print_error(UsageError(_sentence(exc)), as_json=as_json)
        return Exit.USAGE
    except VmMigrateError as error:
        print_error(error, as_json=as_json)
        return exit_of_error(error)
    except KeyboardInterrupt:
        complain("interrupted")
        return Exit.CANCELLED
    except BrokenPipeError:
        # Whoever read us has enough. The interpreter would complain again when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    except Exception as exc:
        if os.environ.get("VMM_DEBUG"):
            raise
        complain(f"a defect, please report it: {type(exc).__name__}: {exc} (VMM_DEBUG=1 shows where)")
        return Exit.DEFECT


def _sentence(exc: CycloptsError) -> str:
    return f"{' '.join(str(exc).split()).rstrip('.')}; see `vmmigrate --help`"


def _wants_json(arguments: Sequence[str]) -> bool:
    """Asked before parsing, because parsing may be what fails."""
    return any(pair in {("-o", "json"), ("--output", "json")} for pair in pairwise(arguments)) or bool(
        {"-ojson", "-o=json", "--output=json"} & set(arguments)
    )


if __name__ == "__main__":
    sys.exit(main())
