"""What the pages share: templates, and blocks of data that scripts decode on demand."""

import base64
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from posmask.report import figures
from posmask.report.v8 import call_vl_convert
from posmask.results.table import COMPARED, format_number, format_signed

__all__ = ["chart_blocks", "render", "zipped"]

_HERE = Path(__file__).parent


def render(name: str, variables: Mapping[str, Any], blocks: Mapping[str, bytes]) -> str:
    """Return a page as HTML.

    Args:
        name: of its template and script.
        variables: of its template.
        blocks: data by name, for its script.
    """
    files = ("page.css", "common.js", "latents.js", f"{name}.js")
    style, *scripts = ((_HERE / file).read_text(encoding="utf8") for file in files)
    encoded = {name: base64.b64encode(block).decode() for name, block in blocks.items()}
    template = _TEMPLATES.get_template(f"{name}.html")
    return template.render(**variables, blocks=encoded, style=style, script="\n".join(scripts))


def chart_blocks(charts: Mapping[str, figures.Figure]) -> dict[str, bytes]:
    """Return the blocks of charts, and of the library that draws them."""
    blocks = {
        f"chart-{name}": zipped(json.dumps(figures.as_spec(chart), allow_nan=False)) for name, chart in charts.items()
    }
    return blocks | {"vega": zipped(_vega_bundle())} if charts else blocks


def zipped(text: str) -> bytes:
    """Return a text as a block."""
    return gzip.compress(text.encode(), 9, mtime=0)


def _vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script that sets `window.vegaEmbed`."""
    return call_vl_convert("javascript_bundle")


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters |= {
    "number": format_number,
    "signed": format_signed,
    "minus": lambda text: re.sub(r"(?<!\w)-(?=\d)", "−", text),
    "column_title": lambda name: COMPARED[name].full_title if name in COMPARED else name,
}
