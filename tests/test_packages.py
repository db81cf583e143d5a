"""Imported packages are declared: a package installed only as a dependency of another could be missing elsewhere."""

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


def test_imported_packages_are_declared():
    packages = importlib.metadata.packages_distributions()
    declared = names(PROJECT["dependencies"]).union(*(names(PROJECT["optional-dependencies"][x]) for x in USERS_EXTRAS))
    for path, text in SOURCES.items():
        for module in set(imported(text)) - set(sys.stdlib_module_names) - {"posmask"}:
            packages_of_module = {name.lower().replace("_", "-") for name in packages.get(module, [module])}
            assert packages_of_module & declared, (
                f"{path.name} imports {module} of {packages_of_module}, which pyproject.toml does not declare"
            )


@pytest.mark.parametrize("extra", USERS_EXTRAS)
def test_an_error_message_names_each_extra_with_its_pip_command(extra):
    lines = [
        line for text in SOURCES.values() for line in text.splitlines() if f"pip install 'posmask[{extra}]'" in line
    ]
    assert lines


def test_error_messages_name_only_existing_extras():
    extras = {extra for text in SOURCES.values() for extra in re.findall(r"posmask\[([\w,]+)\]", text)}
    assert extras <= set(USERS_EXTRAS)
