"""Guests in QEMU."""
