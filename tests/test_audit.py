"""Installed packages have their pinned versions, and known vulnerabilities fail CI."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_dependency_is_pinned_at_the_installed_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    todo, installed = [("posmask", "dev")], {}
    while todo:
        name, *extras = todo.pop()
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            wanted = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            key = canonicalize_name(needed.name), *sorted(needed.extras)
            if wanted and key not in installed:
                installed[key] = importlib.metadata.version(needed.name).partition("+")[0]
                todo.append(key)
    assert len(installed) > 100
    mismatched = {
        key[0]: (version, pinned.get(key[0])) for key, version in installed.items() if pinned.get(key[0]) != version
    }
    mismatched.pop("posmask", None)
    assert not mismatched


def test_known_vulnerabilities_fail_and_missing_data_is_reported(audit):
    """Uses the output format of pip-audit 2.10."""
    fine = {"name": "rich", "version": "15.0.0", "vulns": []}
    weak = {"name": "jinja2", "version": "2.10", "vulns": [{"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"]}]}
    unknown = {"name": "jinja2", "skip_reason": "Dependency not found on PyPI and could not be audited: jinja2 (2.10)"}

    def verdict(*packages):
        return audit.verdict(json.dumps({"dependencies": packages, "fixes": []}))

    report, code = verdict(fine, weak)
    assert code == 1
    assert "jinja2 2.10: PYSEC-2019-217, mended in 2.10.1" in report
    assert "2 packages audited, 1 known vulnerabilities" in report
    report, code = verdict(fine, unknown)
    assert (report, code) == ("1 packages audited, no known vulnerabilities. PyPI does not know jinja2.", 0)
    assert verdict(unknown) == audit.verdict("") == ("Not audited: PyPI's vulnerability data is out of reach.", 0)
