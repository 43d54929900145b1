"""Settings of the whole suite."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which reads it then
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed prints to stdout that it found no other

torch.set_num_threads(1)  # tiny models lose more than they gain from a second thread


SLOWEST = ("tests/training/", "tests/test_recovery.py", "tests/test_docs.py", "tests/test_fuzz.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOWEST))


def pytest_collection_finish() -> None:
    """Spare every later collection of garbage the modules and tests, which are most of what there is and stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory) -> None:
    """Keep what tests have made out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
