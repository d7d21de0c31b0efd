"""The settings without which no daemon starts; a test writes what it is about behind them."""

from typing import Final

NEEDED: Final = """
[tls]
ca = "ca.pem"
certificate = "host.pem"
key = "host-key.pem"
[directories]
state = "state"
runtime = "run"
"""
