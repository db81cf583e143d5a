"""Charts as files for a paper."""

from pathlib import Path

from posmask.report.figures.style import Figure, as_spec
from posmask.report.v8 import call_vl_convert
from posmask.storage.atomic import check_file, replacing

__all__ = ["write_figures"]

_MARK = b"written by posmask"  # a comment in each file, which identifies it


def write_figures(charts: dict[str, Figure], folder: Path) -> list[Path]:
    """Write every chart as SVG and PDF, as wide as two columns of a paper; return the paths.

    Raises:
        BadSetting: a file of that name exists and was not written by posmask.
        OutOfMemory: see `call_vl_convert`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in charts:
        for ending in ("svg", "pdf"):
            check_file(folder / f"{name}.{ending}", _MARK)
    written = []
    for name, chart in charts.items():
        spec = as_spec(chart)
        if spec.get("width") == "container":
            spec["width"] = 520
        config = {
            "background": "white",
            "font": "sans-serif",
            "view": {"stroke": None},
            "legend": {"layout": {"top": {"anchor": "start", "direction": "vertical"}}},
            "mark": {"color": "#222"},
        }
        spec["config"] = {**spec.get("config", {}), **config}
        svg = call_vl_convert("vegalite_to_svg", spec)
        contents = {
            folder / f"{name}.svg": svg.encode() + b"\n<!-- " + _MARK + b" -->\n",
            folder / f"{name}.pdf": call_vl_convert("svg_to_pdf", svg) + b"\n% " + _MARK + b"\n",
        }
        for path, content in contents.items():
            with replacing(path, _MARK) as beside:
                beside.write_bytes(content)
        written += contents
    return written
