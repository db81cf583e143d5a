"""An installed wheel works without the repository."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path, model_folder):
    """A .pth file makes the dependencies of this environment importable, but not posmask itself."""

    def run(*words, **more):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = (tmp_path / "wheels").iterdir()
    run(python, *pip, "install", "--no-deps", wheel)
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    module_file = run(python, "-c", "import posmask; print(posmask.__file__)").strip()
    assert Path(module_file).is_relative_to(site_packages)

    posmask = tmp_path / "env" / "bin" / "posmask"
    assert "auto means" in run(posmask, "doctor", POSMASK_CACHE=str(tmp_path / "cache"))
    texts = "\n".join(f"{word} bird {number} runs" for number in range(400) for word in ("red", "blue", "old"))
    for number, text in enumerate(texts.splitlines()):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number:04}.txt").write_text(text + " and sleeps" * (number % 7))
    (tmp_path / "study.toml").write_text(STUDY.format(model=model_folder))
    output = run(posmask, "run", "study.toml", "--root", "run")
    assert "The page: run/report.html" in output
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000


STUDY = """
name = "wheel"
seeds = [0]
[model]
name = "{model}"
layer = 2
precision = "float32"
[corpus]
texts = "texts"
n_positions = 16
training_tokens = 1000
heldout_tokens = 3000
[sae]
d_sae = 32
rule = {{ kind = "topk", k = 4 }}
[training]
n_steps = 20
batch_tokens = 256
learning_rate = 5e-3
[evaluation]
retention_positions = 4
shift_texts = 20
shift_windows = 4
model_contexts = 8
order_tasks = []
order_train_groups = 2
order_test_groups = 2
probe_datasets = []
probe_train = 2
probe_test = 2
ks = [1, 5]
[[cells]]
name = "open"
mask = {{ kind = "open" }}
"""
