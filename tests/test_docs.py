"""Examples and commands of the documentation run and give the shown output.

EXAMPLES lists each example by page and first words, with the test that runs it or the reason why none does. Commands
within sentences and tables are checked against the command line.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import typer.main
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from conftest import D_MODEL, WORDS, make_texts
from posmask import masks
from posmask.auditing.measures import ORDER_COLUMNS, POSITION_COLUMNS, REMOVAL_COLUMNS
from posmask.cli.commands import app
from posmask.cli.printing import results_table, slurm_line, table_note
from posmask.data import embedded
from posmask.evaluation.latent_table import CLASS_RULES, COLUMNS, KIND_RULES, PROFILE_COLUMNS
from posmask.results.comparisons import read_verdicts
from posmask.results.finding import finding
from posmask.results.rows import read_rows
from posmask.results.table import summarize
from posmask.study.study_file import read_study
from test_wheel import STUDY

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# `make docs` also writes the notebook as a page; the notebook has a separate test.
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if not page.with_suffix(".ipynb").exists())]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def examples(page):
    """Return (language, code) of each fenced block of a page."""
    return [(match["language"], match["code"]) for match in FENCE.finditer(page.read_text(encoding="utf8"))]


EXAMPLES = {
    ("docs/audit.md", "posmask audit gemma-scope"): "tests/test_auditing.py audits SAEs of each kind on a tiny model",
    ("docs/audit.md", "import posmask"): "tests/test_auditing.py does the same on a tiny model",
    ("README.md", "posmask audit gemma-scope"): "tests/test_auditing.py audits SAEs of each kind on a tiny model",
    ("README.md", "- Of 16,384 latents"): "lines of the audit whose cost docs/log.md records",
    ("README.md", "make run     # sets everything up"): "CI runs `make test`; `make run` was timed by hand",
    ("README.md", "import posmask"): "test_the_python_example_of_the_readme",
    ("docs/architecture.md", "src/posmask/"): "a tree of files",
    ("docs/quick-study.md", "With 1 seed"): "tests/test_cli.py tests the last lines of a run",
    ("docs/quick-study.md", "                                  expl."): "test_the_table_of_the_quick_study_page",
    ("docs/quick-study.md", "runs/quick/"): "a tree of files",
    ("docs/metrics.md", "[[hypotheses]]"): "test_the_example_of_hypotheses_is_valid",
    ("docs/command-line.md", "quick                ━"): "tests/test_progress.py tests the form on a terminal",
    ("docs/command-line.md", "quick, stage 9 of 24"): "tests/test_progress.py tests the form in a log",
    ("docs/index.md", "make run"): "timed by hand, as the README says",
    ("docs/cluster.md", "posmask run STUDY.toml --engine ray"): "tests/test_on_ray.py runs it on a local cluster",
    (
        "docs/cluster.md",
        "torchrun --nproc-per-node 4",
    ): "test_a_cell_trained_by_several_processes_is_evaluated_by_a_run",
    ("docs/cluster.md", "pip install 'posmask[remote]'"): "tests/test_store.py runs it with a local store",
    ("docs/cluster.md", "srun --nodes 2"): "needs Slurm and two nodes; the page says that it was not run",
    ("docs/devices.md", "posmask run STUDY.toml --set device=cuda"): "test_a_device_is_set_from_the_command_line",
    ("docs/own-mask.md", "import torch"): "test_custom_mask",
    ("docs/own-mask.md", "[[cells]]"): "test_custom_mask_in_a_study_file",
    ("docs/own-mask.md", "tensor([[1.0000,"): "test_custom_mask",
    ("docs/own-mask.md", "from posmask.sae.rules import"): "test_custom_mask",
    ("docs/own-mask.md", "from posmask.study.settings import"): "test_custom_mask",
    ("docs/own-model-and-texts.md", "[model]"): "test_custom_model_and_texts",
    ("docs/own-model-and-texts.md", "[corpus]"): "test_custom_model_and_texts",
    ("docs/saelens.md", "posmask export runs/quick/cells/slice-seed0 exported --to"): "test_saelens_page",
    ("docs/saelens.md", "posmask export runs/quick/cells/slice-seed0 exported-typical"): "test_saelens_page",
    ("docs/saelens.md", "from posmask.interop.positions import"): "test_saelens_page",
    ("docs/saelens.md", "import posmask.interop.saelens"): "test_saelens_page",
    ("docs/saelens.md", "import torch"): "test_saelens_page",
    ("docs/saelens.md", "posmask export runs/quick/cells/slice-seed0 exported-lossy"): "test_saelens_page",
    ("docs/saelens.md", "posmask import exported-lossy imported"): "test_saelens_page",
    ("docs/saelens.md", "[[cells]]"): "test_cells_start_from_an_imported_sae",
    ("docs/saelens.md", "# not run here"): "needs sae-bench's environment: tests/interop runs the same calls",
    ("docs/saelens.md", "posmask push runs/quick/cells/slice-seed0"): "test_saelens_page",
    ("docs/saelens.md", "from posmask.interop.hub import"): "test_saelens_page",
}


def example(page, start):
    """Return the code of an example in EXAMPLES."""
    assert (page, start) in EXAMPLES
    return next(code for _, code in examples(ROOT / page) if code.startswith(start))


def test_every_example_has_a_test_or_a_reason():
    shown = {(str(page.relative_to(ROOT)), code) for page in PAGES for _, code in examples(page)}
    for page, code in shown:
        entries = [start for other, start in EXAMPLES if other == page and code.startswith(start)]
        assert len(entries) == 1, f"add this example of {page} to EXAMPLES, with the test that runs it:\n{code}"
    for page, start in EXAMPLES:
        assert any(code.startswith(start) for other, code in shown if other == page), f"{page} has no example {start}"
    tests = {name for name in globals() if name.startswith("test_")} | {"test_saelens_page"}
    assert {how for how in EXAMPLES.values() if how.startswith("test_")} <= tests


def test_the_table_of_the_quick_study_page():
    """The page shows what the command line prints for a kept study at 80 columns."""
    folder, shown = (
        DOCS / "results" / "controls",
        example("docs/quick-study.md", "                                  expl."),
    )
    verdicts, file = read_verdicts(folder / "verdicts.csv"), io.StringIO()
    table = results_table(summarize(read_rows(folder / "summary.csv")), "open", verdicts, 80)
    Console(file=file, width=80).print(table)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert shown.splitlines()[: len(lines)] == lines
    sentences = " ".join(shown.split())
    assert table_note("open", verdicts) in sentences
    assert sentences.endswith(finding(verdicts, "open"))


def test_the_example_of_hypotheses_is_valid(tmp_path):
    text = (ROOT / "studies" / "full.toml").read_text(encoding="utf8")
    (tmp_path / "study.toml").write_text(f"{text}\n{example('docs/metrics.md', '[[hypotheses]]')}", encoding="utf8")
    study = read_study(tmp_path / "study.toml")
    (hypothesis,) = study.hypotheses
    assert (hypothesis.against, hypothesis.expected, study.margins.accuracy) == ("windows + matched", "better", 0.01)


MODULE = re.compile(r"`posmask((?:\.[a-z_]+)+)`")
FILE = re.compile(r"`([\w/]+\.py)`")
OF_A_READER = "my_masks.py"


def test_modules_and_files_in_pages_exist():
    for page in PAGES:
        if page.name == "log.md":  # names of earlier versions
            continue
        text = page.read_text(encoding="utf8")
        for name in set(FILE.findall(text)) - {OF_A_READER}:
            assert (ROOT / name).exists() or (ROOT / "src" / "posmask" / name).exists(), f"{page.name} names {name}"
        for name in MODULE.findall(text):
            value = importlib.import_module("posmask")
            for part in name[1:].split("."):
                with contextlib.suppress(ModuleNotFoundError):
                    importlib.import_module(f"{value.__name__}.{part}")
                value = getattr(value, part, None)
                assert value is not None, f"{page.name} names posmask{name}"


INLINE = re.compile(r"(?<!`)`(posmask [a-z][^`]*)`(?!`)")
WRITTEN = sorted(
    {
        " ".join(line.split())
        for page in [*PAGES, *sorted((ROOT / "studies").glob("*.toml"))]
        for line in (
            *INLINE.findall(page.read_text(encoding="utf8").replace("\n", " ")),
            *re.findall(r"^#\s+(posmask .*)$", page.read_text(encoding="utf8"), re.MULTILINE),
        )
    }
)


@pytest.mark.parametrize("line", WRITTEN)
def test_commands_in_pages_are_valid(line):
    """Options exist, and a study in the command exists and accepts the changes."""
    words = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    command = group.commands[words[0]]
    options = {name: option for option in command.params for name in option.opts if name.startswith("--")}
    for word in words[1:]:
        assert not word.startswith("--") or word in options, f"posmask {words[0]} has no option {word}"
    changes = [words[at + 1] for at, word in enumerate(words) if word == "--set" and "TABLE" not in words[at + 1]]
    for word in words:
        if word.startswith("studies/"):
            read_study(ROOT / word, changes)


def test_custom_mask():
    kinds = dict(masks.MASKS)
    blocks = examples(DOCS / "own-mask.md")
    names: dict = {"__name__": "example"}
    output = io.StringIO()
    try:
        for language, code in blocks:
            if language == "toml":
                continue
            if language == "text":
                assert output.getvalue() == code
                continue
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, "own-mask.md", "exec"), names)
    finally:
        masks.MASKS.clear()
        masks.MASKS.update(kinds)


def test_custom_mask_in_a_study_file(here, model_folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    kinds = dict(masks.MASKS)
    Path("my_masks.py").write_text(example("docs/own-mask.md", "import torch"))
    Path("study.toml").write_text(STUDY.format(model=model_folder) + example("docs/own-mask.md", "[[cells]]"))
    try:
        cell = read_study(Path("study.toml")).cells[-1]
    finally:
        masks.MASKS.clear()
        masks.MASKS.update(kinds)
    assert (cell.mask.kind, type(cell.mask).__module__) == ("my_masks:Stripes", "my_masks")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def posmask(line):
    """Run a command line that starts with `posmask` and return its output."""
    result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write_texts(folder, n_texts=400):
    folder.mkdir(parents=True)
    for number, text in enumerate(make_texts(n_texts)):
        (folder / f"{number:04}.txt").write_text(text)


@pytest.mark.slow
def test_the_python_example_of_the_readme(here, tokenizer, monkeypatch):
    """Run the example with a tiny model, toy texts and fewer tokens."""
    monkeypatch.setattr(embedded, "read_table", lambda name: [(text, "0") for text in make_texts(600)])
    torch.manual_seed(0)
    sizes = {"hidden_size": D_MODEL, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=3 + len(WORDS), max_position_embeddings=128, **sizes)).save_pretrained(
        "tiny"
    )
    tokenizer.save_pretrained("tiny")
    code = example("README.md", "import posmask")
    for theirs, ours in (
        ('"embedded:SmolLM2-135M-Instruct", "layer": 10', '"tiny", "layer": 2'),
        ("n_tokens=150_000", "n_tokens=6_000"),
        ("n_tokens=30_000", "n_tokens=2_000"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["v_hat"].shape == names["batch"].vectors.shape == (20, D_MODEL)
    assert {measure.metric for measure in names["measures"]} >= {"explained_variance", "retention"}


@pytest.mark.slow
def test_custom_model_and_texts(here, model_folder):
    """Run a study with the two tables of the page, a tiny model and fewer tokens."""
    text = STUDY.format(model=model_folder)
    for table in ("[model]", "[corpus]"):
        code = example("docs/own-model-and-texts.md", table)
        text, n_replaced = re.subn(rf"^\[{table[1:-1]}\]\n(?:[^\[].*\n)*", code, text, flags=re.MULTILINE)
        assert n_replaced == 1
    Path("study.toml").write_text(text)
    Path("data").mkdir()
    Path("data/my-texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(800)))
    sizes = {"model.name": model_folder, "corpus.n_positions": 16, "corpus.training_tokens": 2000}
    changes = " ".join(f"--set {key}={value}" for key, value in {**sizes, "corpus.heldout_tokens": 3000}.items())
    posmask(f"posmask run study.toml --root run {changes}")
    assert {row.cell for row in read_rows(Path("run/results.csv"))} >= {"open"}


def test_a_device_is_set_from_the_command_line(here, model_folder):
    """Run the example on the CPU."""
    write_texts(here / "texts")
    Path("STUDY.toml").write_text(STUDY.format(model=model_folder))
    line = example("docs/devices.md", "posmask run STUDY.toml --set device=cuda")
    posmask(line.replace("device=cuda", "device=cpu"))
    assert Path("runs/wheel/report.html").exists()


@pytest.mark.slow
def test_a_cell_trained_by_several_processes_is_evaluated_by_a_run(here, model_folder):
    """Run both lines with two processes instead of four and a tiny study."""
    write_texts(here / "studies" / "texts")
    slices = '[[cells]]\nname = "slice"\nmask = { kind = "slice", n_slices = 4 }\n'
    Path("studies/full.toml").write_text(STUDY.format(model=model_folder) + slices)
    paths = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": paths, "OMP_NUM_THREADS": "1"}
    for line in example("docs/cluster.md", "torchrun --nproc-per-node 4").replace("node 4", "node 2").splitlines():
        result = subprocess.run(shlex.split(line), capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
        if line.startswith("torchrun"):
            assert "slice with seed 0 is trained. Each process sent" in result.stdout
    assert "The page: runs/wheel/report.html" in result.stdout


@pytest.mark.slow
def test_cells_start_from_an_imported_sae(here, model_folder):
    """Run the last example of the page, which follows the blocks that test_saelens_page runs."""
    write_texts(here / "studies" / "texts")
    quick = Path("studies/quick.toml")
    quick.write_text(STUDY.format(model=model_folder))
    posmask("posmask run studies/quick.toml --root runs/first")
    posmask("posmask export runs/first/cells/open-seed0 exported-lossy --to saelens-lossy")
    posmask("posmask import exported-lossy imported")
    output = posmask("posmask evaluate imported studies/quick.toml")
    assert "Written: runs/wheel/evaluated/imported" in output
    quick.write_text(quick.read_text().partition("[[cells]]")[0] + example("docs/saelens.md", "[[cells]]"))
    posmask("posmask run studies/quick.toml --set evaluation.shift_texts=80")
    cells = {row.cell: row.value for row in read_rows(Path("runs/wheel/results.csv")) if row.metric == "l0"}
    assert 0 < cells["slices"] <= 4


@pytest.mark.slow
@pytest.mark.embedded
def test_the_tutorial_runs_and_gives_its_stored_output(tmp_path, monkeypatch):
    """Takes about three minutes. Digits may differ between processors; the rest of the output must not."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    stored = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    run = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(run, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()

    def shown(notebook):
        outputs = [
            output
            for cell in notebook.cells
            if cell.cell_type == "code"
            for output in cell.outputs
            if output.get("name") != "stderr"
        ]
        texts = [re.sub(r"\d", "0", output.get("text", "picture")) for output in outputs]
        return texts, sum("image/png" in output.get("data", {}) for output in outputs)

    assert shown(run) == shown(stored)
    assert shown(stored)[1] == 4


@pytest.mark.slow
@pytest.mark.embedded
def test_the_notebook_of_audits_runs(tmp_path):
    """Takes about five minutes. Which latents it shows may differ between processors."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(DOCS / "audit-notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=2400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any("depend on position at q < 0.05" in output.get("text", "") for output in outputs)


@pytest.mark.parametrize("columns", [COLUMNS, PROFILE_COLUMNS, POSITION_COLUMNS, ORDER_COLUMNS, REMOVAL_COLUMNS])
def test_every_column_of_an_audit_is_documented(columns):
    page = (DOCS / "audit.md").read_text(encoding="utf8")
    for name, meaning in columns.items():
        assert f"| `{name}` | {meaning} |" in page


@pytest.mark.parametrize("rules", [CLASS_RULES, KIND_RULES])
def test_every_rule_of_an_audit_is_documented(rules):
    page = (DOCS / "audit.md").read_text(encoding="utf8")
    for name, rule in rules.items():
        assert f"| {name} | {rule} |" in page


def test_the_slurm_command_is_the_one_that_plan_prints():
    shown = example("docs/cluster.md", "srun --nodes 2").replace("\\\n", "").split()
    assert shown == slurm_line(Path("STUDY.toml")).split()


def test_each_test_that_a_page_names_exists():
    root = Path(__file__).parents[1]
    named = {name for page in root.glob("docs/*.md") for name in re.findall(r"tests/[\w/]+\.py", page.read_text())}
    assert len(named) > 15
    assert [name for name in sorted(named) if not (root / name).is_file()] == []
