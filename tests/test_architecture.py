"""Imports go down only. The table is the house's plan; a new module needs a place in it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import posmask
from posmask.mask_kinds import MASKS
from posmask.settings import read_study

LEVELS = [
    ["errors"],
    ["rows", "seeds", "progress", "bootstrap"],
    ["folders"],
    ["record", "assets", "checkpoints", "kernels", "masks", "intervals", "store", "summary", "texts", "verdicts"],
    ["model", "corpus", "machines"],
    ["choosing"],
    ["mask_kinds", "rules", "activations"],
    ["sae"],
    ["objective", "metrics", "probing"],
    ["training", "latents"],
    ["parallel"],
    ["evaluation", "interop", "tracking"],
    ["settings"],
    ["sources"],
    ["cells"],
    ["engines"],
    ["on_ray"],
    ["study"],
    ["workbench"],
    ["rates"],
    ["planning", "scaling"],
    ["terminal"],
    ["cli"],
]
REPORT_MAY_IMPORT = {"errors", "rows", "folders", "record", "summary", "verdicts", "report"}
PACKAGE = Path(posmask.__file__).parent


def imported(path):
    """Top-level posmask modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "posmask":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posmask."):
            yield node.module.split(".")[1]


def test_imports_go_down_only():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for other in imported(path):
            if module == "report":
                assert other in REPORT_MAY_IMPORT, f"{path.name} imports {other}"
            elif other != module and not (module == "cli" and other == "report"):
                assert level[other] < level[module], f"{path.name} (level {level[module]}) imports {other}"


def removals(path):
    """Calls that remove, rename or overwrite a file or folder, wherever in a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, of = node.func.attr, ast.unparse(node.func.value)
        one_word = len(node.args) == 1 and not node.keywords  # Path.replace(target), not str.replace(old, new)
        if (
            name in ("rmtree", "unlink", "rmdir", "rename", "renames", "removedirs", "rm", "rm_file", "truncate")
            or (name == "replace" and (one_word or of == "os"))
            or (name in ("remove", "move") and of in ("os", "shutil"))
        ):
            yield f"{of}.{name}"


def test_files_are_removed_and_replaced_in_one_module_only():
    found = {path.relative_to(PACKAGE).as_posix(): set(removals(path)) for path in PACKAGE.rglob("*.py")}
    assert found.pop("folders.py") >= {"shutil.rmtree", "path.unlink", "path.rename", "beside.replace"}
    assert found.pop("store.py") == {"self._fs.rm_file"}  # in the store
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_reports_need_no_torch():
    code = "import sys, posmask.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_library_names_no_cells_of_a_study():
    studies = sorted((Path(__file__).parents[1] / "studies").glob("*.toml"))
    names = {cell.name for study in studies for cell in read_study(study).cells} - {*MASKS}
    assert "split-width" in names
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("page.*")]:
        text = path.read_text(encoding="utf8")
        assert not [name for name in names if re.search(rf"[\"'`]{re.escape(name)}[\"'`]", text)], path.name
