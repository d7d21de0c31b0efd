"""Instance specs: what a machine is, in every version that a fleet may speak.

Pure: text in, values out. One module per API version (`v1`, `v2`, `v3`), joined by `chain`; `latest` names the
newest types; `machine` is the internal form; `build` and `creatable` are the two gates; `amend` puts a
destination's backends in place; `openings` says what of a spec a host would open; `captured` reads the RON of
Propolis' own migration protocol. Modules are imported by name (`from vmmigrate.spec import document`); nothing is
imported here, as this costs pydantic.
"""

__all__ = [
    "amend",
    "build",
    "captured",
    "chain",
    "creatable",
    "diff",
    "document",
    "keys",
    "latest",
    "loss",
    "machine",
    "openings",
    "overview",
    "reading",
    "requests",
    "ron",
    "schema",
    "validate",
    "volume",
    "wire_v0",
]
