import pytest
from tiny_model import save_tiny_model, train_sentencepiece

from glm_hf.cli import main


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Folder of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model", train_sentencepiece(folder / "tiny.model"))
    return folder / "model"


@pytest.fixture
def run(capsys):
    def run_command(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command
