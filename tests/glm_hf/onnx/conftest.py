from collections.abc import Callable
from importlib.resources import files

import pytest
from golden import golden_model

from glm_hf.onnx import ORTGLMForBlankInfilling, export_onnx

WORLD_FACTS = str(files("glm_hf") / "world_facts")


@pytest.fixture(scope="session")
def golden_folder(tmp_path_factory) -> Callable[..., str]:
    """Function that saves a model with the original's weights, and returns the folder."""
    saved: dict = {}

    def folder(name: str, **changes: object) -> str:
        key = (name, *sorted(changes.items()))
        if key not in saved:
            saved[key] = str(tmp_path_factory.mktemp(name) / "model")
            golden_model(name, **changes).save_pretrained(saved[key])
        return saved[key]

    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[..., ORTGLMForBlankInfilling]:
    """Function that exports a folder, once with the same settings, and opens the graph."""
    opened: dict = {}

    def open_graph(src: str, **settings: object) -> ORTGLMForBlankInfilling:
        key = (src, *sorted(settings.items()))
        if key not in opened:
            folder = tmp_path_factory.mktemp("graph") / "graph"
            export_onnx(src, folder, **settings)
            opened[key] = ORTGLMForBlankInfilling.from_pretrained(folder)
        return opened[key]

    return open_graph


@pytest.fixture(scope="session")
def world_facts(exported) -> ORTGLMForBlankInfilling:
    """The graph of the demonstration model in fp32."""
    return exported(WORLD_FACTS)
