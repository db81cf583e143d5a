import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from posmask.errors import DamagedFolder
from posmask.folders import write_folder
from posmask.report import write_report
from posmask.rows import Measure, Row, write_rows
from posmask.verdicts import Verdict, write_verdicts

PARTS = ("position", "content", "interaction")
HOSTILE = "<script>alert(1)</script>"


def write_cell(root, name, mask):
    measures = [
        Measure("explained_variance", 0.8123, 0.80, 0.82, 1000),
        *(Measure("explained_variance", 0.8 if p else float("nan"), n=9, slice={"position": p}) for p in range(4)),
        Measure("retention", 0.25, 0.24, 0.26, 30),
        Measure("order_accuracy", 0.61, 0.5, 0.7, 50, {"task": HOSTILE, "k": 5, "pooling": "mean"}),
        Measure("order_shuffled", 0.51, 0.4, 0.6, 50, {"task": HOSTILE, "k": 5, "pooling": "mean"}),
        Measure("order_permuted", 0.48, 0.4, 0.6, 50, {"task": HOSTILE, "k": 5, "pooling": "mean"}),
        Measure("probe_accuracy", 0.77, 0.7, 0.8, 50, {"dataset": "toy", "k": 5, "source": "sae", "pooling": "mean"}),
        Measure("retention", 0.25, 0.24, 0.26, 30, {"after": "0"}),
        Measure("retention_chance", 0.12, 0.11, 0.13, 30, {"after": "0"}),
        *(
            Measure(f"shift_{part}", 1 / 3, 0.3, 0.4, 30, {"mask": "on"})
            for part in ("position", "content", "interaction")
        ),
    ]
    found = [Row.of(m, cell=name, mask=mask, budget="width", apply="forward", seed=0) for m in measures]
    with write_folder(root / "cells" / f"{name}-seed0", {"cell": name, "note": HOSTILE}) as draft:
        write_rows(draft / "rows.csv", found)
        (draft / "curve.csv").write_text("tokens,explained_variance\n100,0.2\n200,0.5\n")
        openness = np.ones((4, 6), np.float32) if mask == "open" else np.eye(4, 6, dtype=np.float32)
        save_file({"openness": openness}, draft / "openness.safetensors")
    return found


@pytest.fixture
def root(tmp_path):
    controls = [Measure(name, 0.5, n=50, slice={"task": HOSTILE}) for name in ("order_bag_accuracy", "order_edges")]
    own = [Row.of(m, cell="llm", mask="none", budget="", apply="", seed=0) for m in controls]
    cells = [*write_cell(tmp_path, "open", "open"), *write_cell(tmp_path, "hard", "hard")]
    write_rows(tmp_path / "results.csv", [*own, *cells])
    verdict = Verdict("hard", "open", "order k=5", -0.0123, -0.2, 0.1, 0.04, 1, 2, "no evidence")
    write_verdicts(tmp_path / "verdicts.csv", [verdict])
    return tmp_path


def test_the_page_holds_every_cell_and_fetches_nothing(root):
    page = write_report(root).read_text(encoding="utf8")
    assert page.count('<th scope="row">hard</th>') == 4
    assert "hard − open" in page
    assert "-0.012" in page
    assert "corrected p 0.04 of 2 comparisons; 1 seed" in page
    assert "0.812" in page
    assert "95 % interval 0.8000 to 0.8200, n = 1,000" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)\s*=\s*"?(https?:)?//', page)
    for name in ("trade-off", "position", "loss", "shift", "decay", "masks", "curves"):
        spec = re.search(rf'id="spec-{name}">(.*?)</script>', page, re.S)
        assert json.loads(spec.group(1))["$schema"].endswith(".json")


def test_text_from_data_never_runs_as_html(root):
    page = write_report(root).read_text(encoding="utf8")
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_folder_without_results_or_with_a_tampered_cell_is_refused(root, tmp_path):
    (root / "cells" / "hard-seed0" / "curve.csv").write_text("tokens,explained_variance\n")
    with pytest.raises(DamagedFolder, match=r"curve\.csv is not what was written"):
        write_report(root)
    (root / "results.csv").unlink()
    with pytest.raises(DamagedFolder, match=r"holds no results\.csv"):
        write_report(root)
