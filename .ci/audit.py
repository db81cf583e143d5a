"""Asks PyPI for known vulnerabilities of every package pinned in constraints.txt, through pip-audit.

    python .ci/audit.py constraints.txt

Exit code 1 when one is found. Where PyPI's vulnerability data is out of reach that is said, and the exit code is 0.
"""

import json
import subprocess
import sys


def verdict(report: str) -> tuple[str, int]:
    """What to say of pip-audit's JSON, empty where it came to none, and the exit code."""
    try:
        packages = json.loads(report)["dependencies"]
    except json.JSONDecodeError:
        packages = []
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        return "Not audited: PyPI's vulnerability data is out of reach.", 0
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in {' '.join(found['fix_versions']) or 'none'}"
        for package in asked
        for found in package["vulns"]
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    unknown = f" PyPI does not know {', '.join(skipped)}." if skipped else ""
    lines.append(f"{len(asked)} packages audited, {len(lines) or 'no'} known vulnerabilities.{unknown}")
    return "\n".join(lines), int(len(lines) > 1)


if __name__ == "__main__":
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "pypi", "--disable-pip", "--no-deps"]
    command += ["--format", "json", "--requirement", sys.argv[1]]
    said, code = verdict(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    print(said)
    sys.exit(code)
