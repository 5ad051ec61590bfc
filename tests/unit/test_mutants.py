"""The table of mutants: a change of the code that moves a text must move it there too."""

from __future__ import annotations

from tests.mutants.__main__ import ROOT, wrong_entries
from tests.mutants.table import MUTANTS


def test_each_mutant_changes_one_place() -> None:
    assert wrong_entries([*MUTANTS]) == []


def test_each_mutant_names_tests_that_exist() -> None:
    assert [
        one.promise for one in MUTANTS if not one.tests or not all((ROOT / test).is_file() for test in one.tests)
    ] == []
