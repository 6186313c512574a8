"""`python -m nemotron_recipes.worker --config FILE`: one rank of one stage; the same under torchrun."""

from __future__ import annotations

import sys

from nemotron_recipes.worker.runtime import main

if __name__ == "__main__":
    sys.exit(main())
