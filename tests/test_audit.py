"""What is installed is what is pinned, and a known vulnerability stops CI."""

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


def test_every_package_that_posmask_brings_is_pinned_at_the_version_that_is_tested():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    todo, found = [("posmask", "dev")], {}
    while todo:
        name, *extras = todo.pop()
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            wanted = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            key = canonicalize_name(needed.name), *sorted(needed.extras)
            if wanted and key not in found:
                found[key] = importlib.metadata.version(needed.name).partition("+")[0]
                todo.append(key)
    assert len(found) > 100
    wrong = {key[0]: (version, pinned.get(key[0])) for key, version in found.items() if pinned.get(key[0]) != version}
    wrong.pop("posmask", None)
    assert not wrong


def test_a_known_vulnerability_fails_and_silence_is_said(audit):
    """As pip-audit 2.10 writes it."""
    fine = {"name": "rich", "version": "15.0.0", "vulns": []}
    weak = {"name": "jinja2", "version": "2.10", "vulns": [{"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"]}]}
    unknown = {"name": "jinja2", "skip_reason": "Dependency not found on PyPI and could not be audited: jinja2 (2.10)"}

    def verdict(*packages):
        return audit.verdict(json.dumps({"dependencies": packages, "fixes": []}))

    said, code = verdict(fine, weak)
    assert code == 1
    assert "jinja2 2.10: PYSEC-2019-217, mended in 2.10.1" in said
    assert "2 packages audited, 1 known vulnerabilities" in said
    said, code = verdict(fine, unknown)
    assert (said, code) == ("1 packages audited, no known vulnerabilities. PyPI does not know jinja2.", 0)
    assert verdict(unknown) == audit.verdict("") == ("Not audited: PyPI's vulnerability data is out of reach.", 0)
