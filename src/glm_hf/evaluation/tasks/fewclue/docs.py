"""Documents of FewCLUE, which is no data set of the Hub: JSON lines in a folder for each task."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

FILE = "test_public.json"


def load(name: str, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """
    Return the documents of a task, those without a label left out.

    Args:
        name: Name of the task's folder.
        data_dir: Folder that it is in.

    Raises:
        FileNotFoundError: If it is not there.
    """
    if data_dir is None:
        raise FileNotFoundError("give the folder datasets of github.com/CLUEbenchmark/FewCLUE by --data-dir")
    lines = (Path(data_dir) / name / FILE).read_text(encoding="utf-8").splitlines()
    docs = [json.loads(line) for line in lines if line.strip()]
    return DatasetDict({"test": Dataset.from_list([doc for doc in docs if doc.get("label", "") not in ("-", None)])})


load_bustm = partial(load, "bustm")
load_chid = partial(load, "chid")
load_cluewsc = partial(load, "cluewsc")
load_csl = partial(load, "csl")
load_eprstmt = partial(load, "eprstmt")
load_ocnli = partial(load, "ocnli")
