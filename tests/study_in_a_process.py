"""Run posmask's command line on toy texts: `python study_in_a_process.py ARGUMENTS`.

Prints a line to standard error when each stage begins. The stage that POSMASK_TEST_ENDLESS names repeats its work
without end, as a large study would.
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "reliability")]

from tiny_study import put_toy_texts

from posmask import report
from posmask.cli.commands import main
from posmask.data import harvest
from posmask.study import cell
from posmask.training import loop

STAGES = {
    "harvest": (harvest, "_shard"),
    "training": (loop._Trainer, "step"),
    "evaluation": (cell, "evaluate_to_folder"),
    "page": (report, "write_report"),
}


def announced(stage, function):
    """Return the function with a line before it, and without an end if its stage is the endless one."""

    def announce(*args, **options):
        print(f"stage {stage}", file=sys.stderr, flush=True)
        result = function(*args, **options)
        while os.environ.get("POSMASK_TEST_ENDLESS") == stage:
            result = function(*args, **options)
        return result

    return announce


put_toy_texts()
for stage, (owner, name) in STAGES.items():
    setattr(owner, name, announced(stage, getattr(owner, name)))
if __name__ == "__main__":  # Helpers of `run --jobs` import this module.
    main()
