"""Stands in for tests of exporters, which the source distribution lacks."""


class ExportTesterMixin:
    pass
