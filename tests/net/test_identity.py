"""Identities, what a certificate may say, and the table of rights."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from vmmigrate.errors import IdentityError
from vmmigrate.net import pki
from vmmigrate.net.identity import (
    ALLOWED,
    MAX_NAME_CHARS,
    MAX_TRUST_DOMAIN_CHARS,
    Call,
    Identity,
    Role,
    check_allowed,
    check_expected,
    identity_of_certificate,
)

from .conftest import TRUST_DOMAIN, Site, host_identity

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
DOMAINS = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,60}[a-z0-9])?", fullmatch=True)


@given(DOMAINS, st.sampled_from(Role), NAMES)
def test_every_identity_is_read_back_from_its_uri(trust_domain: str, role: Role, name: str) -> None:
    identity = Identity(trust_domain, role, name)

    assert Identity.parse(identity.uri) == identity
    assert str(identity) == identity.uri == f"spiffe://{trust_domain}/{role.value}/{name}"


@given(st.text())
def test_any_text_is_an_identity_that_spells_itself_or_is_refused(text: str) -> None:
    refused = None
    try:
        identity = Identity.parse(text)
    except IdentityError as exc:
        refused = exc

    if refused is None:
        assert identity.uri == text
    else:
        assert refused.code == "bad_uri"
        assert "\n" not in refused.text


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "site.example/host/h1",
        "https://site.example/host/h1",
        "SPIFFE://site.example/host/h1",
        "spiffe://Site.example/host/h1",
        "spiffe:///host/h1",
        "spiffe://site.example",
        "spiffe://site.example/host",
        "spiffe://site.example/host/",
        "spiffe://site.example/host/h1/",
        "spiffe://site.example/host/h1/x",
        "spiffe://site.example//host/h1",
        "spiffe://site.example/HOST/h1",
        "spiffe://site.example/guest/h1",
        "spiffe://site.example/host/..",
        "spiffe://site.example/host/-h1",
        "spiffe://site.example/host/h 1",
        "spiffe://site.example/host/h1\n",
        "spiffe://site.example/host/h1\0",
        "spiffe://site.example/host/h%31",
        "spiffe://site.example/host/h1?x=1",
        "spiffe://site.example:443/host/h1",
        "spiffe://user@site.example/host/h1",
        "spiffe://site.example/host/ｈ1",
        "spiffe://site.example/host/" + "h" * (MAX_NAME_CHARS + 1),
        "spiffe://" + "d" * (MAX_TRUST_DOMAIN_CHARS + 1) + "/host/h1",
        "spiffe://site.example/host/" + "h" * 100_000,
    ],
)
def test_a_uri_that_is_not_exactly_of_our_form_is_refused(uri: str) -> None:
    with pytest.raises(IdentityError) as caught:
        Identity.parse(uri)

    assert caught.value.code == "bad_uri"
    assert len(caught.value.text) < 500


def test_the_longest_names_are_accepted() -> None:
    identity = Identity("d" * MAX_TRUST_DOMAIN_CHARS, Role.ORCHESTRATOR, "n" * MAX_NAME_CHARS)

    assert Identity.parse(identity.uri) == identity


@pytest.mark.parametrize(
    ("uris", "code"),
    [
        ([], "no_uri_san"),
        (["spiffe://site.example/host/h1", "spiffe://site.example/host/h2"], "several_uri_sans"),
        (["spiffe://site.example/host/h1", "spiffe://site.example/host/h1"], "several_uri_sans"),
        (["https://site.example/host/h1"], "bad_uri"),
        (["spiffe://elsewhere.example/host/h1"], "foreign_trust_domain"),
        (["spiffe://site.example/operator/h1"], "wrong_role"),
        (["spiffe://site.example/host/h2"], "wrong_host"),
    ],
)
@pytest.mark.parametrize("form", ["dictionary", "der"])
def test_each_wrong_certificate_has_a_code_of_its_own(site: Site, uris: list[str], code: str, form: str) -> None:
    certificate = _certificate(site, uris, form)

    with pytest.raises(IdentityError) as caught:
        identity_of_certificate(certificate, trust_domain=TRUST_DOMAIN, expected=host_identity("h1"))

    assert caught.value.code == code


@pytest.mark.parametrize("form", ["dictionary", "der"])
def test_names_of_machines_do_not_matter(site: Site, form: str) -> None:
    certificate = _certificate(site, ["spiffe://site.example/host/h1"], form)

    assert identity_of_certificate(certificate, trust_domain=TRUST_DOMAIN) == host_identity("h1")


@pytest.mark.parametrize(("certificate", "code"), [(None, "no_certificate"), (b"junk", "certificate_invalid")])
def test_what_is_no_certificate_has_no_identity(certificate: bytes | None, code: str) -> None:
    with pytest.raises(IdentityError) as caught:
        identity_of_certificate(certificate)

    assert caught.value.code == code


def test_a_wrong_name_names_both_the_peer_and_the_expected() -> None:
    operator = Identity(TRUST_DOMAIN, Role.OPERATOR, "ada")

    with pytest.raises(IdentityError) as caught:
        check_expected(Identity(TRUST_DOMAIN, Role.OPERATOR, "bob"), operator)

    assert caught.value.code == "wrong_name"
    assert "operator/bob" in caught.value.text
    assert "operator/ada" in caught.value.text


def test_another_trust_domain_is_told_apart_from_another_host() -> None:
    with pytest.raises(IdentityError) as caught:
        check_expected(Identity("elsewhere.example", Role.HOST, "h1"), host_identity("h1"))

    assert caught.value.code == "foreign_trust_domain"


# Written out by hand: the table must not be its own judge.
RIGHTS = {
    Call.INSTANCE_READ: "operator orchestrator",
    Call.INSTANCE_WRITE: "operator orchestrator",
    Call.MIGRATE: "operator orchestrator",
    Call.MIGRATION_READ: "operator orchestrator",
    Call.MIGRATION_CANCEL: "operator orchestrator",
    Call.MIGRATION_ADJUST: "operator orchestrator",
    Call.SIDE: "operator orchestrator host",
    Call.SIDE_SETTLE: "orchestrator host",
    Call.SUPERSEDE: "host",
    Call.RESOLVE: "operator orchestrator",
    Call.MIGRATION_PROTOCOL: "host",
    Call.BULK: "host",
}


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("call", list(Call))
def test_a_role_may_use_its_calls_and_no_other(role: Role, call: Call) -> None:
    identity = Identity(TRUST_DOMAIN, role, "x")

    if role.value in RIGHTS[call].split():
        check_allowed(identity, call)
    else:
        with pytest.raises(IdentityError) as caught:
            check_allowed(identity, call)
        assert caught.value.code == "forbidden"
        assert call.value in caught.value.text


def test_the_table_knows_every_role() -> None:
    assert set(ALLOWED) == set(Role)


def _certificate(site: Site, uris: list[str], form: str) -> bytes | dict[str, object]:
    if form == "dictionary":
        return {"subjectAltName": (("DNS", "h1"), *(("URI", uri) for uri in uris), ("IP Address", "127.0.0.1"))}
    now = datetime.now(UTC)
    leaf = pki.make_leaf(
        site.authority, uris, now, now + timedelta(hours=1), dns_names=["h1"], ip_addresses=["127.0.0.1"]
    )
    return leaf.certificate.public_bytes(Encoding.DER)
