"""What the real types accept, reject, convert and write, row by row.

Each test goes through a whole corpus and reports all disagreements at once. A row may differ only under a rule of
fixtures/specs/deviations.toml, and only from accepted to refused.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.spec.spec_corpus import FIXTURES, VERSIONS, deviation_for, deviations, documents, rows
from vmmigrate.errors import LossyDowngradeError, SpecAmendError, SpecBuildError, SpecError, SpecParseError
from vmmigrate.jsontext import compact
from vmmigrate.spec import amend, chain, document
from vmmigrate.spec.build import build
from vmmigrate.spec.decode import Tagged
from vmmigrate.spec.document import read_text
from vmmigrate.spec.machine import to_latest
from vmmigrate.spec.requests import TYPES

NEWEST_IN_CORPUS = "v3"


class Verdicts:
    """Counts agreement and collects disagreements."""

    def __init__(self) -> None:
        self.rows = 0
        self.used: set[str] = set()
        self.disagreements: list[str] = []

    def compare(self, row: str, expected: str | None, got: str | None, error: SpecError | None) -> None:
        """*expected* and *got* are the texts written, None for a refusal."""
        self.rows += 1
        if expected == got:
            return
        rule = deviation_for(error.code, error.text) if error is not None and expected is not None else None
        if rule is None:
            self.disagreements.append(f"{row}: expected {expected and expected[:300]}, got {error or got}")
        else:
            self.used.add(rule)

    def check(self, at_least: int) -> None:
        assert self.disagreements == []
        assert self.rows >= at_least, "the corpus was read to its end"


def check_cases() -> Verdicts:
    verdicts = Verdicts()
    for row in rows("cases"):
        got, error = None, None
        try:
            got = document.serialise(document.parse(row["spec_version"], row["input"]))
        except SpecParseError as caught:
            error = caught
        verdicts.compare(row["id"], compact(row["normalized"]) if row["accepted"] else None, got, error)
    return verdicts


def check_api_cases() -> Verdicts:
    verdicts = Verdicts()
    for row in rows("api_cases"):
        got, error = None, None
        try:
            codec = TYPES[row["type"]]
            got = compact(codec.write(read_text(codec, row["input"])))
        except SpecParseError as caught:
            error = caught
        verdicts.compare(row["id"], compact(row["normalized"]) if row["accepted"] else None, got, error)
    return verdicts


def check_builds() -> Verdicts:
    verdicts = Verdicts()
    for row in rows("spec_build"):
        spec = document.parse(row["spec_version"], compact(row["input"]))
        for features, result in row["results"].items():
            result = row["results"][result.get("same_as", features)]
            compare_build(verdicts, row, spec, features, result)
    return verdicts


def compare_build(verdicts: Verdicts, row: dict[str, Any], spec: chain.AnySpec, features: str, result: Any) -> None:
    expected, got, error = None, None, None
    if result["ok"]:
        expected = json.loads(compact(result["latest"]))
        if row.get("cpuid_from_stand_in_host"):
            del expected["board"]["cpuid"]
    try:
        built = to_latest(build(spec, frozenset(features.split("+")) - {"default"}))
        got = document.serialise(chain.convert(built, NEWEST_IN_CORPUS))
    except SpecBuildError as caught:
        error = caught
    verdicts.compare(f"{row['id']} {features}", expected and compact(expected), got, error)
    if error is not None and result.get("cause") and not error.text.endswith(result["cause"][0]):
        verdicts.disagreements.append(f"{row['id']}: {error.text} does not name {result['cause']}")


def test_every_frozen_document_is_written_back_byte_for_byte() -> None:
    wrong = []
    for version, path in documents():
        text = path.read_text(encoding="utf-8").removesuffix("\n")
        if document.serialise(document.parse(version, text)) != text:
            wrong.append(path.name)

    assert wrong == []
    assert len(documents()) >= 75


def test_the_type_accepts_rejects_and_writes_as_the_real_one() -> None:
    check_cases().check(at_least=2600)


def test_the_types_around_a_spec_accept_reject_and_write_as_the_real_ones() -> None:
    check_api_cases().check(at_least=240)


def test_the_builder_agrees_with_the_real_one_under_every_feature_set() -> None:
    check_builds().check(at_least=59 * 4)


def test_every_rule_of_the_deviations_is_met_by_a_row() -> None:
    """A rule that forgives nothing would hide a defect one day."""
    used = check_cases().used | check_api_cases().used | check_builds().used

    assert used == {rule["rule"] for rule in deviations() if rule["in_corpus"]}


def test_a_deviation_never_turns_a_reject_into_an_accept() -> None:
    """The comparison forgives refusals only; this is what that rests upon."""
    verdicts = Verdicts()

    verdicts.compare("row", None, "{}", None)
    verdicts.compare("row", "{}", "[]", None)

    assert len(verdicts.disagreements) == 2


def test_conversions_up_are_exactly_the_real_ones() -> None:
    found = [row for row in rows("conversions") if row["direction"] == "up"]
    for row in found:
        spec = document.parse(row["from"], compact(row["input"]))
        for version, output in row["outputs"].items():
            assert document.serialise(chain.convert(spec, version)) == compact(output), row["id"]
    assert len(found) >= 48


def test_conversions_down_are_exact_or_name_what_the_real_ones_drop() -> None:
    found = [row for row in rows("conversions") if row["direction"] == "down"]
    for row in found:
        spec = document.parse(row["from"], compact(row["input"]))
        for version, output in row["outputs"].items():
            lossless = row["lossless_to_v2"] if (row["from"], version) == ("v3", "v2") else row["lossless"]
            if lossless:
                assert document.serialise(chain.convert(spec, version)) == compact(output), row["id"]
                continue
            with pytest.raises(LossyDowngradeError) as caught:
                chain.convert(spec, version)
            dropped = [(lost.get("component"), lost.get("type") or lost["field"]) for lost in row["lost"]]
            if version != "v1":
                dropped = [lost for lost in dropped if lost[0] is not None]
            assert [(lost["component"], lost["what"]) for lost in caught.value.details["lost"]] == dropped, row["id"]
    assert len(found) >= 36


def test_amendments_give_what_the_real_ones_give() -> None:
    """With every allowance, as the real ones compare neither generations nor volumes."""
    allowances = amend.Allowances.of(["*"], allow_same_generation=True, allow_volume_change=True)
    verdicts = Verdicts()
    for row in rows("amend"):
        spec = document.parse("v1", compact(row["source_spec"]))
        sets = [[], ["failure-injection"]] if row["build_features"] == "any" else [row["build_features"]]
        for features in sets:
            got, error = None, None
            try:
                replacements = amend.parse_replacements(row["replacements_text"])
                got = document.serialise(amend.amend(spec, replacements, allowances, frozenset(features)))
            except (SpecAmendError, SpecParseError) as caught:
                error = caught
            verdicts.compare(row["id"], compact(row["result_v1"]) if row["ok"] else None, got, error)
    verdicts.check(at_least=60)


def component_codec(version: str) -> Tagged:
    (codec,) = (field.codec for field in chain.CHAIN.version(version).model.table.fields if field.name == "components")
    return codec.item


def test_every_component_of_a_version_occurs_in_its_fixtures() -> None:
    """A document with a component that no fixture shows could change its shape unseen."""
    for version in VERSIONS:
        seen: set[str] = set()
        for path in [path for of, path in documents() if of == version]:
            spec = document.parse(version, path.read_bytes())
            seen |= {component.tag for component in spec.components.values()}
        assert seen == set(component_codec(version).variants), version


def test_every_folder_of_fixtures_is_a_version_of_the_chain() -> None:
    folders = {path.name for path in FIXTURES.iterdir() if path.name.startswith("v")}

    assert folders <= set(chain.CHAIN.names)
    assert {"v1", "v2", "v3"} <= folders
