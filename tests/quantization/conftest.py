"""Models that several files quantize."""

from pathlib import Path

import pytest
from golden import DATA, golden_config

from glm_hf.conversion import convert_sat_checkpoint


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Golden cfg2 in fp16."""
    folder = tmp_path_factory.mktemp("plain") / "hf"
    convert_sat_checkpoint(DATA / "cfg2" / "sat_tp1", folder, config=golden_config("cfg2"))
    return folder
