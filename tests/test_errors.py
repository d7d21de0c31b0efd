"""The hierarchy of errors: one code per class, and the same words on every surface."""

from __future__ import annotations

import json

import pytest

from vmmigrate import errors
from vmmigrate.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, SpecError, VmMigrateError


def every_class(root: type[VmMigrateError] = VmMigrateError) -> list[type[VmMigrateError]]:
    return [root, *(cls for sub in root.__subclasses__() for cls in every_class(sub))]


CLASSES = [cls for cls in every_class() if cls.__module__ == errors.__name__]

# Codes cross the wire, the API and the command line: a line is only ever added.
FROZEN_CODES = {
    "VmMigrateError": "internal",
    "UsageError": "usage",
    "RequestError": "conflict",
    "ProtocolError": "protocol",
    "LocalProtocolError": "protocol_local",
    "RemoteProtocolError": "protocol_remote",
    "NegotiationError": "negotiation_failed",
    "SpecError": "spec_invalid",
    "SpecParseError": "spec_parse",
    "SpecBuildError": "spec_build",
    "SpecCreatableError": "spec_not_creatable",
    "LossyDowngradeError": "lossy_downgrade",
    "SpecAmendError": "spec_amend",
    "PayloadError": "device_payload",
    "HypervisorError": "hypervisor",
    "IdentityError": "identity",
    "TransportError": "transport",
    "ConvergenceError": "will_not_converge",
    "StorageError": "storage",
    "JournalError": "journal",
    "PeerError": "peer",
    "MigrationCancelled": "cancelled",
    "HandoffInDoubt": "in_doubt",
}


def test_codes_are_stable_and_no_two_classes_share_one() -> None:
    codes = {cls.__name__: cls.default_code for cls in CLASSES}

    assert {name: codes.get(name) for name in FROZEN_CODES} == FROZEN_CODES
    assert len(set(codes.values())) == len(codes)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_stands_in_the_tree_of_the_module(cls: type[VmMigrateError]) -> None:
    assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_says_its_code_text_and_details_on_every_surface(cls: type[VmMigrateError]) -> None:
    plain = cls("disk0: not found", details={"component": "disk0"})
    finer = cls("disk0: not found", code="no_such_disk")

    assert str(plain) == plain.text == plain.args[0] == "disk0: not found"
    assert plain.as_dict() == {
        "code": cls.default_code,
        "message": "disk0: not found",
        "details": {"component": "disk0"},
    }
    assert (finer.code, finer.details) == ("no_such_disk", {})
    assert json.loads(json.dumps(plain.as_dict())) == plain.as_dict()


def test_details_are_the_errors_own_copy() -> None:
    given = {"a": 1}
    error = VmMigrateError("text", details=given)

    given["a"] = 2

    assert error.details == {"a": 1}


def test_whose_fault_it_is_can_be_caught_apart_and_together() -> None:
    assert issubclass(LocalProtocolError, ProtocolError)
    assert issubclass(RemoteProtocolError, ProtocolError)
    assert not issubclass(LocalProtocolError, RemoteProtocolError)
    assert {cls.__name__ for cls in CLASSES if issubclass(cls, SpecError)} == {
        "SpecError",
        "SpecParseError",
        "SpecBuildError",
        "SpecCreatableError",
        "LossyDowngradeError",
        "SpecAmendError",
    }


@pytest.mark.parametrize("odd", ["a\nb", "a\rb", "\x1b[2Jb", "a\u2028b", "a\ud800b", "a\x00b", "a\x85b"])
def test_an_error_is_one_line_that_commands_no_terminal(odd: str) -> None:
    """Names that a peer chose stand in errors, and errors stand in logs and on terminals."""
    error = VmMigrateError(f"unknown field '{odd}'")

    assert error.text.isprintable()
    assert str(error) == error.as_dict()["message"] == error.text
    assert odd not in error.text


def test_printable_texts_of_any_language_stay_as_they_are() -> None:
    assert VmMigrateError("gibt es nicht: 'Gerät', 装置 – ё").text == "gibt es nicht: 'Gerät', 装置 – ё"
