"""Places where people run posmask: read-only packages, no home, a parent folder of somebody else, odd terminals."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import posmask
from posmask.data import embedded
from posmask.errors import BadSetting

CANNOT_DROP = os.geteuid() == 0 and shutil.which("setpriv") is None
WITHOUT_RIGHTS = (
    ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner", "--inh-caps", "-all"]
    if os.geteuid() == 0
    else []
)
"""Begins a command that may not write to read-only folders, though it runs as root."""


@pytest.fixture
def read_only(tmp_path):
    """Copy the package into a folder that cannot be written to, with a home that cannot be either."""
    folder = tmp_path / "package"
    shutil.copytree(Path(posmask.__file__).parent, folder / "posmask", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "home").mkdir()
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    yield folder
    for path in folders:
        path.chmod(0o755)


def without_rights(code, folder, **environment):
    return subprocess.run(
        [*WITHOUT_RIGHTS, sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(CANNOT_DROP, reason="setpriv is not installed: root may write everywhere")
def test_compiled_loops_need_neither_a_writable_package_nor_a_home(read_only):
    code = "import os, posmask.kernels.cpu; print(os.environ['NUMBA_CACHE_DIR'])"
    done = without_rights(code, read_only, HOME=str(read_only / "home"))
    assert done.returncode == 0, done.stderr
    assert "posmask-numba-" in done.stdout
    assert not Path(done.stdout.strip()).exists()


def test_the_cache_of_compiled_loops_stays_where_it_can_be_written(tmp_path):
    code = "import os, posmask.kernels; print(os.environ.get('NUMBA_CACHE_DIR'))"
    package = Path(posmask.__file__).parents[1]
    for environment, expected in (({"HOME": str(tmp_path)}, "None"), ({"NUMBA_CACHE_DIR": "/x"}, "/x")):
        assert without_rights(code, package, **environment).stdout.strip() == expected


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch):
    monkeypatch.delenv("POSMASK_CACHE", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BadSetting, match="this user has no home for downloads: set POSMASK_CACHE"):
        embedded.cache_folder()
