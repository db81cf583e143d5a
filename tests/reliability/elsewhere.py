"""Run the tiny study with given sizes and print a checksum of each file, as `harness.contents` reads it.

python tests/reliability/elsewhere.py MODEL ROOT JOBS TOKENS_PER_SHARD TOKENS_PER_FORWARD
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import contents
from tiny_study import STUDY, put_toy_texts

from posmask.data import harvest
from posmask.study import run
from posmask.study.study_file import read_study
from posmask.training import loop

# The worker processes of a run import this file again, so these settings hold for them too.
MODEL, ROOT = Path(sys.argv[1]), Path(sys.argv[2])
JOBS, harvest._TOKENS_PER_SHARD, harvest._TOKENS_PER_FORWARD = map(int, sys.argv[3:])
os.cpu_count = lambda: 2  # One thread per process on every machine.
torch.set_num_threads(1)
put_toy_texts()


def sharing(train):
    """Delay the first training until the other process has finished a cell, so that both processes work."""

    def waiting(*args, **kwargs):
        deadline = time.monotonic() + 300
        while not list(ROOT.glob("cells/*/manifest.json")):
            assert time.monotonic() < deadline, "the other process finished no cell"
            time.sleep(0.1)
        return train(*args, **kwargs)

    return waiting


if __name__ == "__main__":
    if JOBS == 2:
        loop.train = sharing(loop.train)
    path = ROOT.with_suffix(".toml")
    path.write_text(STUDY.replace("MODEL", str(MODEL)), encoding="utf8")
    run.run_study(read_study(path), ROOT, lambda text: None, JOBS)
    print(json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in contents(ROOT).items()}))
