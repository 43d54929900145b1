"""
The package of transformers' common tests: what its source distribution lacks, then what `fetch.py` took out of it.

The fetched modules import their neighbours relatively, so they run under any package name.
"""

from importlib.metadata import version
from pathlib import Path

FETCHED = Path(__file__).parents[3] / ".cache" / "transformers-tests" / version("transformers") / "tests"
if not FETCHED.is_dir():
    raise ImportError(f"{FETCHED} is missing; run: python tests/hf_common/fetch.py")
__path__.append(str(FETCHED))
