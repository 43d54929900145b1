from importlib import import_module

import pytest

from glm_hf.deprecated.modules import RENAMED


@pytest.mark.parametrize("old", RENAMED)
def test_old_name_of_a_module_gives_the_module_and_a_warning(old):
    pytest.importorskip("deepspeed")
    new = import_module(RENAMED[old])
    with pytest.warns(DeprecationWarning, match=rf"{old} is {RENAMED[old]} now"):
        assert import_module(old) is new
    assert new.__name__ == new.__spec__.name == RENAMED[old]
