"""Run the command by `python -m glm_hf.cli`."""

import sys

from glm_hf.cli import run

sys.exit(run())
