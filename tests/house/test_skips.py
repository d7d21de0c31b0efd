"""The rule of tests/conftest.py: under `make check`, what is required is not skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parent.parent / "conftest.py"

TESTS = """
    import pytest

    @pytest.mark.required
    def test_required():
        pytest.skip("no such device")

    def test_optional():
        pytest.skip("not installed")

    @pytest.mark.required
    @pytest.mark.xfail(reason="known", strict=True)
    def test_expected_to_fail():
        assert False

    @pytest.mark.required
    @pytest.mark.skipif(True, reason="by condition")
    def test_required_with_a_condition():
        pass
"""


@pytest.fixture
def house(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A directory with our conftest and nothing else of ours."""
    monkeypatch.delenv("VMM_CHECK", raising=False)
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nmarkers = required: x\naddopts = -ra -p no:trio")
    return pytester


def test_a_required_test_that_skips_fails_under_check(house: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMM_CHECK", "1")
    house.makepyfile(TESTS)

    result = house.runpytest()

    result.assert_outcomes(failed=1, errors=1, skipped=1, xfailed=1)  # skipif: an error, as it strikes in setup
    result.stdout.fnmatch_lines(["*test_required is required and may not be skipped here: no such device*"])
    result.stdout.fnmatch_lines(["*test_required_with_a_condition is required*: by condition*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_without_check_a_skip_is_only_reported(house: pytest.Pytester) -> None:
    house.makepyfile(TESTS)

    result = house.runpytest()

    result.assert_outcomes(skipped=3, xfailed=1)
    result.stdout.fnmatch_lines(["SKIPPED * no such device"])
    assert result.ret == pytest.ExitCode.OK


def test_a_module_that_skips_as_a_whole_fails_under_check(
    house: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its marks are never seen: it skips while it is imported."""
    monkeypatch.setenv("VMM_CHECK", "1")
    house.makepyfile('import pytest\npytest.skip("no kernel support", allow_module_level=True)\n')

    result = house.runpytest()

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*skipped as a whole*no kernel support*"])
