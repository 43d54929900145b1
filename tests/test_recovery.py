"""A few of the random ends that `make kill` puts to every command, the same ones every time."""

import random

import pytest
from fuzzing import import_everything
from kills import SIGNALS, Commands, end_and_repeat

NAMES = (
    *("convert", "quantize", "export-sat", "reshard", "export-hub", "analyze", "export-3d"),
    *("tokenize-corpus", "tokenize", "train"),
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Commands:
    import_everything()
    commands = Commands(tmp_path_factory.mktemp("commands"))
    commands.prepare()
    return commands


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_was_ended_and_repeated_makes_the_same(commands, tmp_path, name, kind):
    _, problems = end_and_repeat(commands, name, kind, random.Random(f"{name} {kind}"), tmp_path)
    assert problems == []
