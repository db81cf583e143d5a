"""Packages import only packages above them, and other rules of the layout that a reader relies on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import posmask
from posmask.masks import MASKS
from posmask.sae.rules import RULES
from posmask.study.study_file import read_study

LAYERS = [
    {"errors", "seeds"},
    {"progress"},
    {"storage", "kernels"},
    {"results", "masks"},
    {"data", "sae"},
    {"training", "probing"},
    {"evaluation", "interop"},
    {"study"},
    {"auditing", "report", "notebook"},
    {"cli"},
]
"""Names on one line do not import each other."""
REPORT_MAY_IMPORT = {"errors", "storage", "results", "report"}
PACKAGE = Path(posmask.__file__).parent


def imported(path):
    """Top-level names of posmask that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "posmask":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posmask."):
            yield node.module.split(".")[1]


def test_packages_import_only_packages_above_them():
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    violations = []
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if package == "__init__":
            continue
        above = {name for name in layer if layer[name] < layer[package]}
        allowed = REPORT_MAY_IMPORT if package == "report" else above | {package}
        violations += [
            f"{path.relative_to(PACKAGE)} imports {other}" for other in imported(path) if other not in allowed
        ]
    assert violations == []


def test_json_files_are_read_in_one_place():
    """Otherwise a file that is nested too deeply ends in a traceback where the reader forgot it."""
    reading = re.compile(r"json\.load\(|json\.loads\([^\n]*read_text")
    found = [path.name for path in PACKAGE.rglob("*.py") if reading.search(path.read_text(encoding="utf8"))]
    assert found == ["json_file.py"]


REMOVALS = {"rmtree", "unlink", "rmdir", "rename", "renames", "removedirs", "rm", "rm_file", "truncate"}
REMOVALS |= {"remove", "move", "replace"}


def removals(path):
    """Calls that remove, rename or overwrite a file or folder, wherever in a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
            yield from (alias.name for alias in node.names if alias.name in REMOVALS)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, of = node.func.attr, ast.unparse(node.func.value)
        one_word = len(node.args) == 1 and not node.keywords  # Path.replace(target), not str.replace(old, new)
        if (
            name in REMOVALS - {"remove", "move", "replace"}
            or (name == "replace" and (one_word or of == "os"))
            or (name in ("remove", "move") and of in ("os", "shutil"))
        ):
            yield f"{of}.{name}"


def test_only_the_storage_modules_remove_and_replace_files():
    calls = {path.relative_to(PACKAGE).as_posix(): set(removals(path)) for path in PACKAGE.rglob("*.py")}
    assert calls.pop("storage/atomic.py") >= {"shutil.rmtree", "path.unlink", "beside.replace"}
    assert calls.pop("storage/manifest.py") >= {"shutil.rmtree", "path.rename"}
    assert calls.pop("storage/remote.py") == {"self._fs.rm_file"}  # in the store
    assert {name for name, removed in calls.items() if removed} == set()


def test_reports_need_no_torch():
    code = "import sys, posmask.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_library_names_no_cells_of_a_study():
    studies = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))
    names = {cell.name for study in studies for cell in read_study(study).cells} - {*MASKS, *RULES}
    assert "split-width" in names
    for path in (path for ending in ("py", "html", "js", "css") for path in PACKAGE.rglob(f"*.{ending}")):
        text = path.read_text(encoding="utf8")
        assert not [name for name in names if re.search(rf"[\"'`]{re.escape(name)}[\"'`]", text)], path.name
