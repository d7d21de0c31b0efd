"""Keys belong to one session and one purpose, and to nobody else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vmmigrate.errors import RemoteProtocolError
from vmmigrate.net.secrets import RANDOM_BYTES, SessionContext, SessionSecrets, proof, ticket_hash

CONTEXT = SessionContext(
    protocol=1,
    migration_id="3dd63c0a-1599-48bd-a84f-2e419b205049",
    instance_id="1cee5a1b-936d-4132-9d0a-2b6fbb0a8b6e",
    source_host="alpha",
    destination_host="beta",
    session_number=1,
)
DESTINATION_RANDOM = bytes(range(32))
SOURCE_RANDOM = bytes(range(32, 64))

OTHER: dict[str, Any] = {
    "protocol": 2,
    "migration_id": "3dd63c0a-1599-48bd-a84f-2e419b20504a",
    "instance_id": "1cee5a1b-936d-4132-9d0a-2b6fbb0a8b6f",
    "source_host": "alphb",
    "destination_host": "betb",
    "session_number": 2,
}
WORD = st.text("ab1/", max_size=3)  # few letters, so that fields joined without care would often be alike
CONTEXTS = st.builds(SessionContext, st.integers(1, 12), WORD, WORD, WORD, WORD, st.integers(0, 12))


def secrets(context: SessionContext = CONTEXT) -> SessionSecrets:
    return SessionSecrets(context, DESTINATION_RANDOM, SOURCE_RANDOM)


def test_both_ends_derive_the_same_key() -> None:
    assert secrets().key("page digest") == secrets().key("page digest")
    assert len(secrets().key("page digest")) == 32


def test_keys_are_those_of_every_other_build() -> None:
    """Frozen: a build that derives others cannot migrate to or from this one."""
    assert secrets().key("page digest").hex() == "d0a4f5511aaadcd6e1c45e96c2fd9525878768c056201eaed341a6236cad5460"
    assert proof(b"k" * 32, b"one", b"two").hex() == "7adbad4b34e2e6f1128353208dc2d20838b5bf108e48ae1e5ec60e4b8873d552"
    assert ticket_hash("a ticket") == "8ecfb166adaccee9516e0054853b8d764d55e4bb97e0503ac765c82f4c1b8fcc"


@pytest.mark.parametrize("field", OTHER)
def test_a_session_that_differs_in_one_field_has_other_keys(field: str) -> None:
    other = secrets(replace(CONTEXT, **{field: OTHER[field]}))

    assert other.key("page digest") != secrets().key("page digest")


@given(CONTEXTS, CONTEXTS, WORD, WORD)
def test_different_sessions_and_labels_never_join_to_the_same_bytes(
    one: SessionContext, two: SessionContext, label: str, other: str
) -> None:
    """("ab", "c") and ("a", "bc") are two sessions."""
    assume((one, label) != (two, other))

    assert secrets(one).key(label) != secrets(two).key(other)


@pytest.mark.parametrize("which", [0, 1])
def test_a_fresh_random_of_either_side_gives_other_keys(which: int) -> None:
    randoms = [DESTINATION_RANDOM, SOURCE_RANDOM]
    randoms[which] = bytes(32)

    assert SessionSecrets(CONTEXT, *randoms).key("x") != secrets().key("x")


def test_the_randoms_are_not_interchangeable() -> None:
    assert SessionSecrets(CONTEXT, SOURCE_RANDOM, DESTINATION_RANDOM).key("x") != secrets().key("x")


@pytest.mark.parametrize("size", [0, RANDOM_BYTES - 1, RANDOM_BYTES + 1])
@pytest.mark.parametrize("which", [0, 1])
def test_a_random_of_another_length_is_refused(which: int, size: int) -> None:
    """A peer that says less would weaken the key; one that says more could shift bytes from one half to the other."""
    randoms = [DESTINATION_RANDOM, SOURCE_RANDOM]
    randoms[which] = bytes(size)

    with pytest.raises(RemoteProtocolError) as caught:
        SessionSecrets(CONTEXT, *randoms)

    assert caught.value.code == "bad_message"


def test_labels_separate_purposes() -> None:
    labels = ["page digest", "bulk hello source", "bulk hello destination", ""]

    assert len({secrets().key(label) for label in labels}) == len(labels)


def test_no_text_of_the_secrets_shows_a_secret() -> None:
    shown = secrets()

    for text in (repr(shown), str(shown), f"{shown}", repr(vars(type(shown)))):
        for secret in (DESTINATION_RANDOM, SOURCE_RANDOM, shown.key("x")):
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text
    assert CONTEXT.migration_id in repr(shown)


@given(st.lists(st.binary(max_size=3), max_size=3), st.lists(st.binary(max_size=3), max_size=3))
def test_proofs_over_different_parts_differ(one: list[bytes], two: list[bytes]) -> None:
    assume(one != two)

    assert proof(b"key", *one) != proof(b"key", *two)


def test_a_ticket_is_stored_as_something_else() -> None:
    assert ticket_hash("one") != ticket_hash("two")
    assert "one" not in ticket_hash("one")
