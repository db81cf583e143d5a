"""Run the examples of docs/saelens.md in order, with a local hub."""

import copy
import re
import shlex
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from conftest import make_sae
from posmask.cli.commands import app
from test_model_hub import cell_folder, local_hub, server  # noqa: F401
from test_saelens import contexts, scaled
from test_saelens_files import random_tensors

PAGE = Path(__file__).parent.parent / "docs" / "saelens.md"


def test_examples_of_the_saelens_page_run(saelens, server, causal_lm, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    cells = tmp_path / "runs" / "quick" / "cells"
    scope = tmp_path / "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    for folder in (cells, scope):
        folder.mkdir(parents=True)
    cell_folder(cells / "slice-seed0", scaled(make_sae("slice")))
    tensors = random_tensors("jumprelu", unit=True)
    np.savez(scope / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    names = {"vectors": contexts()[0], "model": causal_lm, "tokenizer": copy.deepcopy(tokenizer)}
    names["tokenizer"].padding_side, names["tokenizer"].pad_token = "left", "<eos>"
    n_run = 0
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL):
        if block.startswith("# not run here"):
            continue
        if language == "python":
            exec(block, names)
        for line in block.splitlines() if language == "sh" else ():
            result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
            assert result.exit_code == 0, result.output
        n_run += 1
    assert n_run == 9
    assert names["positions"]().tolist() == [[5], [7]]  # of the fourth new token
    assert (tmp_path / "exported-lossy" / "LOSSY.md").exists()
    assert names["codes_at_5"].shape == names["codes_without_mask"].shape == (80, 32)
