"""Commands on SAEs: evaluate one, export it, import one, push one to the hub. `commands` registers them.

Imports are inside the functions, as in `commands`.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from posmask.cli.options import (
    CellFolder,
    Changes,
    ModelName,
    Root,
    StudyFile,
    UnknownPosition,
    parse_count,
    parse_position,
)
from posmask.errors import BadSetting
from posmask.storage import layout

__all__ = ["audit", "evaluate", "export", "import_", "push"]


def audit(
    saes: Annotated[
        list[str],
        typer.Argument(
            metavar="SAE...",
            help="A folder or file, hf:USER/NAME[/PATH] on the hub, a release of SAELens's list followed by an id, or "
            "the folder of a cell. Several SAEs of one site are compared.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A name on the hub, a folder, or embedded:SmolLM2-135M-Instruct.",
            show_default="the one that the SAE states",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=1, help="Residual stream after this many layers.", show_default="what the SAE states"),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            metavar="HOOK",
            help="Site in TransformerLens's words, such as blocks.6.hook_resid_pre.",
            show_default="what the SAE states",
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTS",
            help="File or folder of .txt, .jsonl or .jsonl.zst, or hf:OWNER/NAME for a dataset on the hub (with "
            "--n-texts). 55 % of them are used, selected by a hash.",
            show_default="embedded texts",
        ),
    ] = None,
    n_texts: Annotated[
        int | None, typer.Option(min=1, help="Number of texts to read, from the start.", show_default="all")
    ] = None,
    tokens: Annotated[str, typer.Option(metavar="N", help="Held-out tokens, such as 200000, 200k or 1M.")] = "100k",
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per context, including BOS.", show_default="what the SAE states"),
    ] = None,
    order: Annotated[bool, typer.Option("--order/--no-order", help="Probe codes and stream for order.")] = True,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1 or mps.")] = "cpu",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights (.pt), as `posmask import` does.")
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for vectors and results.", show_default="audits/MODEL-SITE"),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write the charts, as SVG and PDF, to this folder.", show_default=False),
    ] = None,
) -> None:
    """Audit any SAE: which features depend on position, where reconstruction fails, what codes know of order.

    Works on SAEs of other tools and needs no study file. Classifies each latent by stated rules (docs/audit.md);
    measures reconstruction and loss by position, within and beyond the SAE's context; compares probes for order on
    codes and stream; removes the latents that track position. Writes tables, a summary and a page. The same command
    resumes an interrupted audit.
    """
    from posmask import report
    from posmask.auditing import audit_all
    from posmask.auditing.subject import named_saes
    from posmask.cli.printing import audit_table, console

    reports = audit_all(
        named_saes(saes),
        model=model,
        layer=layer,
        site=site,
        texts=texts,
        n_texts=n_texts,
        tokens=parse_count(tokens),
        context=context,
        order=order,
        device=device,
        allow_pickle=allow_pickle,
        root=root,
    )
    console.print(audit_table([one.summary for one in reports]))
    for one in reports:
        print(f"\n{one.summary['name']}")
        for sentence in one.summary["sentences"]:
            print(f"- {sentence}")
        print(f"- Tables: {one.folder}")
    folder, names = reports[0].folder.parents[1], [one.folder.name for one in reports]
    if figures is not None:
        report.write_audit_figures(folder, names, figures)
        print(f"Charts: {figures}")
    print(f"The page: {report.write_audit_page(folder, names)}")


def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="SAE",
            help="Folder of a cell, one written by `posmask import`, or one of another tool.",
            show_default=False,
        ),
    ],
    study_file: StudyFile,
    root: Root = None,
    changes: Changes = None,
) -> None:
    """Evaluate an SAE that was trained elsewhere like the cells of a study, on the same texts.

    Its results go to DIR/evaluated, with a file in SAEBench's format, and are printed beside those of the model
    itself. Measures that need the training run, such as dead latents, are missing.
    """
    from posmask.cli.printing import console, print_wrapped, results_table, table_note
    from posmask.interop import reading
    from posmask.results.table import missing_lines, summarize
    from posmask.sae.files import read_origin
    from posmask.study import run
    from posmask.study.study_file import read_study

    settings = read_study(study_file, changes or ())
    root = root or Path("runs") / settings.name
    rows = run.evaluate_folder(settings, root, folder)
    console.print(results_table(summarize(rows)))
    print_wrapped(table_note(None, ()))
    for line in missing_lines(rows):
        print_wrapped(line)
    written = layout.evaluated_folder(root, folder.resolve().name)
    if (written / layout.SAE_FILE).is_file():  # Earlier versions left it out.
        for remark in reading.remarks(read_origin(written), settings.corpus.n_positions):
            print(remark)
    print(f"Written: {written}")


def export(
    cell: CellFolder,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write; it must not exist yet.", show_default=False)
    ],
    to: Annotated[
        Literal["saelens", "saelens-lossy", "neuronpedia"],
        typer.Option(
            help="Format: the SAE with the mask, or with the mask of one position; or pages of its latents.",
            show_default=False,
        ),
    ],
    model_name: ModelName = None,
    unknown_position: Annotated[
        str | None,
        typer.Option(
            metavar="typical|N|lifted",
            help="Position of vectors whose position a tool does not give; typical: the middle of the context. "
            "lifted (saelens-lossy only): open every latent instead.",
            show_default="saelens: such vectors are an error; saelens-lossy: typical",
        ),
    ] = None,
) -> None:
    """Write a cell's SAE as a folder that SAELens loads, or its latents for Neuronpedia.

    saelens: keeps the mask, as the architecture `posmask`; import posmask.interop.saelens before loading it.

    saelens-lossy: one of SAELens's built-in architectures. They have no positions, so every token is encoded as at one
    position. README.md and LOSSY.md record this, with the explained variance if the run folder has held-out vectors.

    neuronpedia: texts, activations, histogram and logits of each latent that fires, as the batches of SAEDashboard that
    Neuronpedia's converter reads. Nothing is measured.
    """
    from posmask.interop import saelens_files
    from posmask.interop.readme import positions_text

    position = parse_position(unknown_position)
    if to == "neuronpedia":
        _export_neuronpedia(cell, folder, model_name, unknown_position)
        return
    cfg = saelens_files.export_saelens(
        cell, folder, lossy=to == "saelens-lossy", model_name=model_name, unknown_position=position
    )
    print(f"Written: {folder}, architecture {cfg['architecture']}")
    print(positions_text(cfg))
    for key, remedy in (("model_name", "--model-name"), ("hook_name", "an SAE whose folder states its layer")):
        if key not in cfg["metadata"]:
            print(f"cfg.json has no {key}, which SAEBench needs: give {remedy}.")


def _export_neuronpedia(cell: Path, folder: Path, model_name: str | None, unknown_position: str | None) -> None:
    from posmask.interop.neuronpedia import export_neuronpedia

    if unknown_position is not None:
        raise BadSetting("--unknown-position is for SAEs, not for pages of latents: leave it out with --to neuronpedia")
    written = export_neuronpedia(cell, folder, model_name=model_name)
    silent = f"; {written.n_silent:,} never fired and are left out" if written.n_silent else ""
    print(f"Written: {folder}, {written.n_latents:,} latents{silent}")
    layer, hook = written.hook.split(".")[1:]
    print(
        f"For Neuronpedia's converter: --saedashboard-output-dir {folder} --model-name {written.model_name} "
        f"--layer-num {layer} --hook-point {hook} --n-prompts-total {written.n_contexts} "
        f"--n-tokens-in-prompt {written.n_positions}"
    )


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder or file, hf:USER/NAME[/PATH] on the hub, or saelens:RELEASE/ID of SAELens's list.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist yet.", show_default=False)
    ],
    n_positions: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per context.", show_default="the length that its files state"),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model.", show_default="the one that its files state"),
    ] = None,
    hook_name: Annotated[
        str | None,
        typer.Option(
            metavar="HOOK",
            help="Site in TransformerLens's words, such as blocks.12.hook_resid_post.",
            show_default="the one that its files state",
        ),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read pickled weights (.pt) with torch.load(weights_only=True), in a process with limited memory.",
        ),
    ] = False,
) -> None:
    """Convert an SAE of another tool to posmask's format.

    Reads SAELens, sparsify, dictionary_learning (SAEBench), GemmaScope 1 and 2, Llama Scope, Qwen Scope and Goodfire.
    SAEs without a mask become open at every position. Evaluate the folder with `posmask evaluate`, or let a study's
    cells start from it.
    """
    from posmask.interop import reading
    from posmask.sae.files import read_origin

    sae = reading.import_sae(
        source, out, n_positions=n_positions, model_name=model_name, hook_name=hook_name, allow_pickle=allow_pickle
    )
    print(
        f"Written: {out}, {sae.d_sae:,} latents, rule {sae.rule.settings.kind}, mask {sae.mask.settings.kind}, "
        f"{sae.mask.n_positions} positions"
    )
    for remark in reading.remarks(read_origin(out), sae.mask.n_positions):
        print(remark)


def push(
    cell: CellFolder,
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    model_name: ModelName = None,
    unknown_position: UnknownPosition = None,
) -> None:
    """Upload a cell's SAE to the Hugging Face hub, with a card of its results and how to load it.

    Uses the token of huggingface_hub: log in with `hf auth login`, or set HF_TOKEN. Creates the repository if it does
    not exist; replaces a folder of the cell's name in it.
    """
    from posmask.interop import hub

    position = parse_position(unknown_position)
    address = hub.push(cell, repo, private=private, model_name=model_name, unknown_position=position)
    print(f"Pushed: {address}")
