"""`python -m vmmigrate`: the command line, for where the installed command is not on the path."""

from __future__ import annotations

import sys

from vmmigrate.cli.main import main

sys.exit(main())
