"""Run the command by `python -m glm_hf.cli`."""

import sys

from glm_hf.cli import main

sys.exit(main())
