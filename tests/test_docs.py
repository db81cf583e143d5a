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
