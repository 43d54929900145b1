"""A few of the random damages that `make fuzz N=...` tries by the thousand, the same ones every time."""

from pathlib import Path

import pytest
from fuzzing import CLEAN, RIGHT, Subjects, fuzz, import_everything

ROUNDS = 9


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Subjects:
    import_everything()
    subjects = Subjects(tmp_path_factory.mktemp("subjects"))
    subjects.prepare()
    return subjects


def test_damage_of_any_kind_is_one_line_or_no_damage(subjects, tmp_path: Path):
    table, failures = fuzz(subjects, ROUNDS * len(subjects.all()), seed=20, folder=tmp_path)
    assert failures == []
    assert all(counts[CLEAN] for counts in table.values())
    assert sum(counts[RIGHT] for counts in table.values())
