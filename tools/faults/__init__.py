"""Faults at every message boundary of a real migration, and a judge: `python -m tools.faults --help`."""
