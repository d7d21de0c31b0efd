"""Fuzzing: every decoder that reads what somebody else wrote, as functions of bytes. `python -m tools.fuzz --help`."""
