"""The page of results says what the results beside it say."""

import importlib.util
import re
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def answer():
    spec = importlib.util.spec_from_file_location("answer", RESULTS.parents[1] / "studies" / "answer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_of_the_page_is_made_from_the_results_beside_it():
    text = (RESULTS / "README.md").read_text(encoding="utf8")
    assert answer().page(text) == text
    marks = set(re.findall(r"<!-- (?!end of )(.+?) -->", text))
    assert {"full log", "full cells", "full verdicts", "full strictness"} <= marks
    changed = re.sub(r"\| \.\d\d\d \|", "| .999 |", text, count=1)
    assert changed != text
    assert answer().page(changed) == text
