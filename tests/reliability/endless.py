"""Start a run with two jobs that never ends: its worker creates a file, then keeps the interpreter busy.

python tests/reliability/endless.py MODEL ROOT
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_study import STUDY, put_toy_texts

from posmask.study import engines, run
from posmask.study.study_file import read_study

MODEL, ROOT = Path(sys.argv[1]), Path(sys.argv[2])
put_toy_texts()


def endless(*args):
    if engines.multiprocessing.parent_process() is not None:
        (ROOT / "jobs" / "at-work").touch()
    while True:
        time.sleep(0.01)


engines._share = endless  # The worker process imports this file again, so this holds for it too.

if __name__ == "__main__":
    path = ROOT.with_suffix(".toml")
    path.write_text(STUDY.replace("MODEL", str(MODEL)), encoding="utf8")
    run.run_study(read_study(path), ROOT, print, 2)
