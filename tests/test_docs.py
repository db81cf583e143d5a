"""What the documentation shows runs, and shows what comes out."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from posmask import mask_kinds

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```$)?", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["own-mask.md"])
def test_examples_of_a_page_run_in_order_and_print_what_stands_below_them(name):
    kinds = dict(mask_kinds.MASKS)
    blocks = list(BLOCK.finditer((DOCS / name).read_text(encoding="utf8")))
    assert blocks
    names: dict = {"__name__": "example"}
    try:
        for block in blocks:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(block["code"], name, "exec"), names)
            if block["shown"] is not None:
                assert said.getvalue() == block["shown"]
    finally:
        mask_kinds.MASKS.clear()
        mask_kinds.MASKS.update(kinds)


@pytest.mark.slow
@pytest.mark.embedded
def test_the_tutorial_runs_and_its_stored_pictures_are_of_this_version(tmp_path, monkeypatch):
    """About three minutes. Numbers may move in their last digit between processors; what is shown must not."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    stored = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    run = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(run, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()

    def shown(notebook):
        outputs = [
            output
            for cell in notebook.cells
            if cell.cell_type == "code"
            for output in cell.outputs
            if output.get("name") != "stderr"
        ]
        texts = [re.sub(r"\d", "0", output.get("text", "picture")) for output in outputs]
        return texts, sum("image/png" in output.get("data", {}) for output in outputs)

    assert shown(run) == shown(stored)
    assert shown(stored)[1] == 2
