"""What is imported is declared: a package that only another one brought would be missing in somebody's environment."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {path: path.read_text(encoding="utf8") for path in (ROOT / "src").rglob("*.py")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
USERS_EXTRAS = sorted(set(PROJECT["optional-dependencies"]) - {"dev", "docs"})


def names(requirements):
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements}


def imported(text):
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        yield from (module.partition(".")[0] for module in modules)


def test_what_is_imported_is_declared():
    packages = importlib.metadata.packages_distributions()
    declared = names(PROJECT["dependencies"]).union(*(names(PROJECT["optional-dependencies"][x]) for x in USERS_EXTRAS))
    for path, text in SOURCES.items():
        for module in set(imported(text)) - set(sys.stdlib_module_names) - {"posmask"}:
            found = {name.lower().replace("_", "-") for name in packages.get(module, [module])}
            assert found & declared, f"{path.name} imports {module} of {found}, which pyproject.toml does not name"


@pytest.mark.parametrize("extra", USERS_EXTRAS)
def test_an_extra_is_named_with_its_pip_line_by_the_error_that_misses_it(extra):
    said = [
        line for text in SOURCES.values() for line in text.splitlines() if f"pip install 'posmask[{extra}]'" in line
    ]
    assert said


def test_no_error_names_an_extra_that_is_none():
    said = {extra for text in SOURCES.values() for extra in re.findall(r"posmask\[([\w,]+)\]", text)}
    assert said <= set(USERS_EXTRAS)
