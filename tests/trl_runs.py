"""docs/recipes/trl_sft.py as processes."""

import json
import runpy
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "docs" / "recipes" / "trl_sft.py"


def run(*words):
    """The recipe with its arguments; its log is printed as one line."""
    sys.argv = [str(RECIPE), *map(str, words)]
    recipe = runpy.run_path(str(RECIPE))
    logs, trainer = [], recipe["DistillingSFTTrainer"]
    log = trainer.log
    trainer.log = lambda self, values, *rest: (logs.append(dict(values)), log(self, values, *rest))[1]
    recipe["main"]()
    print("\n" + json.dumps(logs))
