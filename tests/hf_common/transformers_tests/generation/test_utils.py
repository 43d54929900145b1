"""Stands in for tests of `generate`, which the source distribution lacks; ours are `test_golden_generation.py`."""


class GenerationTesterMixin:
    pass
