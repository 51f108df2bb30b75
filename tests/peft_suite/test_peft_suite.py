"""Runs PEFT's own tests against sparse_peft's methods, and checks that they would notice a broken one."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import types
from pathlib import Path

import pytest

from .cases import selected_methods
from .known_issues import KNOWN_ISSUES
from .mutants import CONTROLS, FAULTS
from .retarget import replace_inline, replace_list
from .runner import Result, run_file
from .upstream import CACHE_VARIABLE, PACKAGE, SDIST_VARIABLE, TEST_FILES, UpstreamUnavailableError, upstream_folder

# At least so many tests pass for each method: less means that upstream's lists have changed and cases got lost.
FILES = [
    pytest.param("custom", 360, id="custom"),
    pytest.param("config", 26, id="config"),
    pytest.param("decoder", 300, id="decoder", marks=pytest.mark.slow),
    pytest.param("encdec", 105, id="encdec", marks=pytest.mark.slow),
    pytest.param("feature", 60, id="feature", marks=pytest.mark.slow),
    pytest.param("seqcls", 65, id="seqcls", marks=pytest.mark.slow),
]


def report(result: Result) -> str:
    return "\n".join([*result.failures, result.output[-20_000:]])


@pytest.mark.suite
@pytest.mark.parametrize("file, minimum", FILES)
def test_upstream_tests_pass(file: str, minimum: int):
    result = run_file(file, workers=min(2, os.cpu_count()))
    assert result.good and not result.failures, report(result)
    assert result.passed >= minimum * len(selected_methods()), report(result)


# What is broken below is shared by all methods: one of them shows it.
ONE_METHOD = ["sparse"]


@pytest.fixture(scope="module")
def unbroken() -> Result:
    return run_file("custom", methods=ONE_METHOD)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", FAULTS)
def test_upstream_tests_notice_a_broken_tuner(mutant: str, unbroken: Result):
    result = run_file("custom", methods=ONE_METHOD, mutant=mutant)
    assert set(result.failures) - set(unbroken.failures), report(result)
    # it is broken in one respect only
    assert result.returncode == 1 and result.passed > len(result.failures), report(result)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", CONTROLS)
def test_upstream_tests_pass_with_a_control(mutant: str):
    result = run_file("custom", methods=ONE_METHOD, mutant=mutant)
    assert result.good and not result.failures, report(result)


@pytest.mark.slow
def test_no_test_at_all_is_no_success():
    result = run_file("config", expression="no_test_has_this_name")
    assert not result.good
    assert result.passed == 0


@pytest.mark.slow
def test_every_known_issue_is_of_a_test_that_exists():
    only_these = " or ".join(issue.test for issue in KNOWN_ISSUES)
    skips = [
        skip
        for file in ("custom", "config", "decoder", "encdec")
        for skip in run_file(file, expression=only_these).skips
    ]
    skipped = {
        (node.rpartition("::")[2].partition("[")[0], reason.removeprefix("Skipped: ")) for node, reason in skips
    }
    assert {(issue.test, issue.reason) for issue in KNOWN_ISSUES} <= skipped


class TestRetarget:
    @pytest.fixture
    def module(self, monkeypatch) -> types.ModuleType:
        module = types.ModuleType("some_upstream_tests")
        source = (
            "import pytest\n"
            "CASES = [1, 2]\n"
            "UNUSED = [3]\n"
            "class TestSome:\n"
            "    @pytest.mark.parametrize('case', CASES)\n"
            "    @pytest.mark.parametrize('other', [5])\n"
            "    def test_listed(self, case, other): ...\n"
            "@pytest.mark.parametrize('case', [3, 4], ids=['a', 'b'])\n"
            "def test_inline(case): ...\n"
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(source, vars(module))
        return module

    @staticmethod
    def cases(test) -> dict[str, list]:
        return {mark.args[0]: mark.args[1] for mark in test.pytestmark}

    def test_replaces_a_list_where_it_is_used(self, module):
        replace_list(module, "CASES", ("x",))
        assert self.cases(module.TestSome.test_listed) == {"case": ["x"], "other": [5]}
        assert self.cases(module.test_inline) == {"case": [3, 4]}
        assert module.CASES == ["x"]

    def test_replaces_cases_written_in_a_decorator(self, module):
        replace_inline(module, "test_inline", "case", ["y", "z"])
        assert self.cases(module.test_inline) == {"case": ["y", "z"]}
        assert module.test_inline.pytestmark[0].kwargs == {"ids": ["a", "b"]}
        assert self.cases(module.TestSome.test_listed) == {"case": [1, 2], "other": [5]}

    @pytest.mark.parametrize("name", ["UNUSED", "MISSING"])
    def test_refuses_a_list_that_no_test_uses(self, module, name):
        with pytest.raises(pytest.UsageError, match=f"{name}.*laid out differently"):
            replace_list(module, name, ["x"])

    @pytest.mark.parametrize("test, arguments", [("test_gone", "case"), ("test_inline", "renamed")])
    def test_refuses_a_test_that_is_not_there(self, module, test, arguments):
        with pytest.raises(pytest.UsageError, match=f"{test}.*laid out differently"):
            replace_inline(module, test, arguments, ["x"])


class TestUpstreamFolder:
    def test_refuses_a_source_distribution_of_another_version(self, monkeypatch, tmp_path: Path):
        sdist = tmp_path / "peft-0.0.1"
        sdist.mkdir()
        (sdist / "PKG-INFO").write_text("Name: peft\nVersion: 0.0.1\n")
        monkeypatch.setenv(SDIST_VARIABLE, str(sdist))
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        with pytest.raises(UpstreamUnavailableError, match=f"{SDIST_VARIABLE}=.*installed peft"):
            upstream_folder()
        assert not list((tmp_path / "cache").iterdir())

    def test_takes_the_files_of_an_unpacked_source_distribution(self, monkeypatch, tmp_path: Path):
        sdist = tmp_path / "sdist"
        (sdist / "tests").mkdir(parents=True)
        (sdist / "PKG-INFO").write_text(f"Version: {importlib.metadata.version('peft')}\n")
        for stem in (*TEST_FILES.values(), "testing_common", "testing_utils"):
            (sdist / "tests" / f"{stem}.py").write_text(f"# {stem}\n")
        monkeypatch.setenv(SDIST_VARIABLE, str(sdist))
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
        folder = upstream_folder()
        assert (folder / PACKAGE / "testing_common.py").read_text() == "# testing_common\n"
        assert (folder / PACKAGE / "__init__.py").is_file()
        # taken from the cache the second time
        monkeypatch.setenv(SDIST_VARIABLE, str(tmp_path / "gone"))
        assert upstream_folder() == folder
