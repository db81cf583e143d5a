"""The page's figures, as Vega-Lite charts of the study's rows.

A chart of many cells shows the cells that the reader picks: it carries `usermeta.cells`, its values have a field
`cell`, and the page replaces the domain of the color scale.
"""

from collections.abc import Iterable, Sequence

from posmask.report.figures.files import write_figures
from posmask.report.figures.masks import learned_masks, mask_pictures, read_openness, snapshots
from posmask.report.figures.metrics import cost, forgetting, shift_split, strictness
from posmask.report.figures.positions import position_strip, steady
from posmask.report.figures.scatter import trade_off
from posmask.report.figures.style import COLORS, Figure, as_spec, cell_colors
from posmask.report.figures.training import read_curves, training
from posmask.report.reading import SEPARATOR, CellFolder, Numbers
from posmask.report.tables import StudyTable
from posmask.results.rows import Row
from posmask.storage.layout import SNAPSHOTS_FILE

__all__ = ["COLORS", "Figure", "as_spec", "cell_colors", "figures", "steady", "trade_off", "write_figures"]


def figures(
    rows: Sequence[Row],
    study_tables: Sequence[StudyTable],
    pictured: Sequence[CellFolder],
    baselines: Sequence[str],
    warnings: list[str],
) -> dict[str, Figure]:
    """Return every chart for which the studies have numbers, by its name on the page.

    Args:
        rows: rows of all studies.
        study_tables: the studies' tables.
        pictured: the folder of each cell's first seed.
        baselines: the baseline cell of each study.
        warnings: unreadable files are added to it.
    """
    numbers = Numbers(rows)
    lines = [(line, label) for table in study_tables for line, label in table.lines if line.mask != "none"]
    in_tables = {label: of_line for table in study_tables for label, of_line in table.numbers.items()}
    colors = cell_colors(rows)
    masks = {}
    for cell in pictured:
        openness = read_openness(cell, warnings)
        if openness is not None:
            masks[cell.cell] = openness
    learned = {cell.cell for cell in pictured if cell.has(SNAPSHOTS_FILE)}
    curves = read_curves(pictured, warnings)
    charts: dict[str, Figure | None] = {
        "trade-off": trade_off(lines, in_tables, 5, baselines, colors),
        "masks": mask_pictures({cell: openness for cell, openness in masks.items() if not (openness == 1).all()}),
        "snapshots": snapshots([cell for cell in pictured if cell.cell in learned], warnings),
        "learned": learned_masks(
            curves, {cell: openness for cell, openness in masks.items() if cell in learned}, colors
        ),
        "positions": position_strip(
            numbers,
            colors,
            list(dict.fromkeys(row.cell for row in rows if row.mask == "none")),
            _baseline_of(colors, baselines),
        ),
        "strictness": strictness([line for line, _ in lines], baselines),
        "decay": forgetting(numbers, colors),
        "shift": shift_split(numbers, list(colors)),
        "curves": training(curves, colors),
        "cost": cost(numbers, list(colors)),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def _baseline_of(cells: Iterable[str], baselines: Sequence[str]) -> dict[str, str]:
    """The baseline of each cell's study."""
    by_study = {baseline.rpartition(SEPARATOR)[0]: baseline for baseline in baselines}
    if len(baselines) == 1:
        return dict.fromkeys(cells, baselines[0])
    return {cell: by_study[study] for cell in cells if (study := cell.rpartition(SEPARATOR)[0]) in by_study}
