"""The page of audits: numbers equal the tables, every part may be missing, data never runs as HTML, and it works in
Chromium."""

import base64
import gzip
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import HOSTILE, N_POSITIONS, make_sae, write_latents
from posmask.errors import BadSetting, DamagedFolder
from posmask.evaluation.latent_table import CLASS_RULES, CLASSES, KIND_RULES, KINDS
from posmask.report import write_audit_figures, write_audit_page
from posmask.sae.files import write_sae
from posmask.storage.manifest import write_folder

BEYOND, D_SAE = 32, 300
BINS = [(p, p) for p in range(1, N_POSITIONS)]
ENDS = ("", "_low", "_high")


def with_ends(name, value, width):
    """A column and the ends of its interval."""
    return {name: value, f"{name}_low": value - width, f"{name}_high": value + width}


def latents_of(random, lifted):
    kinds = random.choice(KINDS, D_SAE)
    classes = np.array([*(["position-tracking"] * 60 + ["mixed"] * 90), *random.choice(CLASSES[2:], D_SAE - 150)])
    random.shuffle(classes)
    depends = np.isin(classes, CLASSES[:2])
    table = {
        "latent": np.arange(D_SAE),
        "class": classes,
        "kind": np.where(depends, kinds, ""),
        "firings": random.integers(1, 900, D_SAE),
        **with_ends("firing_rate", random.uniform(0.01, 0.1, D_SAE), 0.005),
        **with_ends("position_share", np.where(depends, random.uniform(0.1, 0.9, D_SAE), np.nan), 0.05),
        **with_ends("shift_position", random.uniform(0, 0.1, D_SAE), 0.01),
        "shift_content": random.uniform(0, 1, D_SAE),
        "shift_interaction": random.uniform(0, 1, D_SAE),
        "q_value": np.where(depends, 0.01, random.uniform(0.05, 1, D_SAE)),
        "peak_position": random.integers(1, N_POSITIONS, D_SAE),
        "period": np.where(np.arange(D_SAE) % 5 == 0, 4.0, np.nan),
        "promoted": [f" the {HOSTILE} \u202e"] * D_SAE,
        "example": [f"a text{HOSTILE}« number»{number} \u202eend\n" for number in range(D_SAE)],
    }
    if lifted:
        table |= {"lifted_class": np.array(["content"] * D_SAE)}
    return pd.DataFrame(table)


def positions_of(random, masks, beyond):
    parts = []
    for mask, first, last in [(mask, 1, N_POSITIONS) for mask in masks] + [("on", N_POSITIONS, BEYOND)] * beyond:
        n = last - first
        parts.append(
            pd.DataFrame(
                {
                    "mask": mask,
                    "position": np.arange(first, last),
                    "is_beyond": first == N_POSITIONS,
                    **with_ends("explained_variance", random.uniform(0.7, 0.9, n), 0.05),
                    "explained_variance_with_sinks": random.uniform(0.7, 0.9, n),
                    **with_ends("l0", random.uniform(20, 40, n), 1.0),
                    "stream_norm": random.uniform(90, 100, n),
                    "sink_tokens": (np.arange(n) == 3).astype(int),
                    **with_ends("cross_entropy_increase", np.append(random.uniform(0, 1, n - 1), np.nan), 0.2),
                    "silent_share": random.uniform(0, 0.1, n),
                    "silent_share_null": random.uniform(0, 0.1, n),
                    "dense_share": random.uniform(0, 0.1, n),
                }
            )
        )
    return pd.concat(parts)


def profiles_of(random, masks):
    rates = random.uniform(0, 0.1, (len(masks), D_SAE, len(BINS)))
    return pd.DataFrame(
        [
            [latent, mask, *bin, rate, rate - 0.01, rate + 0.01]
            for mask, of_mask in zip(masks, rates, strict=True)
            for latent, of_latent in enumerate(of_mask)
            for bin, rate in zip(BINS, of_latent, strict=True)
        ],
        columns=["latent", "mask", "first_position", "last_position"] + [f"firing_rate{end}" for end in ENDS],
    )


def order_of(random):
    lines = []
    for k in (1, 5):
        for about, task in (("block", HOSTILE), ("local", "swap"), ("block", "all"), ("local", "all")):
            stream, codes = random.uniform(0.5, 1, 2)
            difference = codes - stream
            lines.append([about, task, k, stream, codes, difference, difference - 0.1, difference + 0.1])
    return pd.DataFrame(lines, columns=["about", "task", "k", "stream", "codes", *(f"difference{e}" for e in ENDS)])


def removal_of(random):
    columns = ["first_position", "last_position", "removed", "latents", *(f"cross_entropy_increase{e}" for e in ENDS)]
    lines = []
    for window in ((1, 15), (1, 7), (8, 15)):
        for removed in ("position-tracking latents", "matched latents"):
            value = random.uniform(0, 1)
            lines.append([*window, removed, 40, value, value - 0.1, value + 0.1])
    return pd.DataFrame(lines, columns=columns)


def plain(value):
    """The same value for JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_audit(root, name, *, masks=("on",), beyond=False, order=True, removal=True, seed=0, change=None):
    """Write the folder of an audited SAE with random numbers, and return its tables by name."""
    random = np.random.default_rng(seed)
    tables = {
        "latents": latents_of(random, "lifted" in masks),
        "profiles": profiles_of(random, masks),
        "positions": positions_of(random, masks, beyond),
        "order": order_of(random).iloc[: None if order else 0],
        "removal": removal_of(random).iloc[: None if removal else 0],
    }
    counts = tables["latents"]["class"].value_counts()
    shares = {
        name: {"count": int(counts.get(name, 0)), **with_ends("share", counts.get(name, 0) / D_SAE, 0.01)}
        for name in CLASSES
    }
    for numbers in shares.values():
        numbers["low"], numbers["high"] = numbers.pop("share_low"), numbers.pop("share_high")
    number = {"value": 0.8766, "low": 0.8, "high": 0.9}
    fate = {"last quarter of the context": 0.71234, "beyond": 0.51234}
    measured = ("explained_variance", "l0", "cross_entropy_increase", "kl_divergence")
    summary = {
        "name": name,
        "model": "toy",
        "site": "blocks.2.hook_resid_post",
        "d_sae": D_SAE,
        "rule": "topk",
        "mask": "open" if masks == ("on",) else "hard",
        "n_positions": N_POSITIONS,
        "tokens": 12_345,
        "texts": f"/home/someone/{HOSTILE}.jsonl".replace("</", "<"),
        "n_texts": 77,
        "sink_tokens": 5,
        "classes": dict.fromkeys(masks, shares),
        "kinds": {mask: dict.fromkeys(KINDS, 3) for mask in masks},
        "explained_variance": number,
        "explained_variance_with_sinks": {"value": 0.5432, "low": None, "high": None},
        "l0": {"value": 31.9, "low": 31.8, "high": 32.0},
        "ce_recovered": {"value": None, "low": None, "high": None, "reason": "no harm"},
        "beyond": {**dict.fromkeys(measured, fate), "latents": {"holds": 7, "fails": 8, "undecided": 9}}
        if beyond
        else None,
        "order": tables["order"][tables["order"]["task"] == "all"].to_dict("records"),
        "removal": tables["removal"].to_dict("records"),
        "rules": {"classes": dict(CLASS_RULES), "kinds": dict(KIND_RULES)},
        "sentences": ["A difference of -0.123 was found.", HOSTILE],
    }
    if change is not None:
        change(tables, summary)
    with write_folder(root / "evaluated" / name, {"sae": name}) as draft:
        sae = make_sae(summary["mask"], d_sae=D_SAE, seed=seed)
        write_sae(sae, draft)
        write_latents(sae, draft, masks=())
        for table in ("latents", "profiles"):
            tables[table].to_parquet(draft / f"{table}.parquet")
        for table in ("positions", "order", "removal"):
            tables[table].to_csv(draft / f"{table}.csv", index=False)
        (draft / "summary.json").write_text(json.dumps(plain(summary)), encoding="utf8")
    return tables | {"summary": summary}


NAMES = ["plain", "masked", "bare"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def tables(root):
    return {
        "plain": write_audit(root, "plain", beyond=True),
        "masked": write_audit(root, "masked", masks=("on", "lifted"), seed=1),
        "bare": write_audit(root, "bare", order=False, removal=False, seed=2),
    }


@pytest.fixture(scope="module")
def page(root, tables):
    return write_audit_page(root, NAMES)


class Tables(HTMLParser):
    """The cells of all tables: lists of (data-value, text) by the table's id."""

    def __init__(self, path):
        super().__init__()
        self.rows, self._table, self._cell, self._in_title = {}, None, None, False
        self.feed(path.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._in_title = tag == "title"
        if tag == "table":
            self._table = self.rows.setdefault(attributes["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._cell = [attributes.get("data-value"), ""]
            self._table[-1].append(self._cell)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None
        self._in_title = False

    def handle_data(self, data):
        if self._cell is not None and not self._in_title:
            self._cell[1] += data


def spec_of(page, name):
    text = re.search(rf'id="block-chart-{name}">([^<]*)<', page.read_text(encoding="utf8")).group(1)
    return json.loads(gzip.decompress(base64.b64decode(text)))


def values_of(page, name):
    """The values of the first data set of a chart."""
    spec = spec_of(page, name)
    part = spec["concat"][1] if "concat" in spec else spec
    return (part.get("data") or part["layer"][0]["data"])["values"]


def panels_of(page):
    """The values of each panel of the chart by position, by the first words of its title."""
    return {
        panel["title"]["text"].partition(",")[0]: (panel.get("data") or panel["layer"][0]["data"])["values"]
        for panel in spec_of(page, "positions")["vconcat"]
    }


def test_tables_equal_the_summaries(page, tables):
    rows = Tables(page).rows
    assert [line[0][1] for line in rows["saes"][1:]] == NAMES
    for line, name in zip(rows["saes"][1:], NAMES, strict=True):
        summary, order = tables[name]["summary"], tables[name]["order"]
        assert [text for _, text in line[1:8]] == [
            "300", "topk", summary["mask"], "0.8770.800 to 0.900", "0.543", "31.931.8 to 32.0", "–",
        ]  # fmt: skip
        for cell, about in zip(line[8:], ("block", "local"), strict=True):
            largest = order[(order["task"] == "all") & (order["k"] == 5) & (order["about"] == about)]
            assert cell[0] == (str(largest["difference"].item()) if len(largest) else "")
    masks = [(line[0][1], line[1][1]) for line in rows["classes"][1:]]
    assert masks == [("plain", "on"), ("masked", "on"), ("masked", "lifted"), ("bare", "on")]
    counts = [int(value) for value, _ in rows["classes"][1][2:]]
    assert counts == [(tables["plain"]["latents"]["class"] == name).sum() for name in CLASSES]
    (beyond,) = rows["beyond-table"][2:]
    assert [text for _, text in beyond] == ["plain", "16–31", *(["0.712", "0.512"] * 4), "7", "8", "9"]
    every = pd.concat([tables[name]["order"] for name in NAMES])
    assert [float(line[-1][0]) for line in rows["order-tasks"][1:]] == every["difference"].tolist()
    every = pd.concat([tables[name]["removal"] for name in NAMES])
    assert [float(line[-1][0]) for line in rows["removals"][1:]] == every["cross_entropy_increase"].tolist()


@pytest.mark.parametrize(
    ("panel", "column"),
    [
        ("explained variance", "explained_variance"),
        ("increase of the cross-entropy", "cross_entropy_increase"),
        ("L0", "l0"),
        ("silent latents", "silent_share"),
        ("dense latents", "dense_share"),
    ],
)
def test_curves_are_means_of_the_table_over_bins_of_positions(page, tables, panel, column):
    values = [value for value in panels_of(page)[panel] if not value["dotted"]]
    assert {value["sae"] for value in values} == set(NAMES)
    seen = []
    for value in values:
        of_sae = tables[value["sae"]]["positions"]
        inside = of_sae["position"].between(value["first position"], value["last position"])
        of_bin = of_sae[inside & (of_sae["is_beyond"] == value["beyond"]) & ("mask " + of_sae["mask"] == value["mask"])]
        of_bin = of_bin[of_bin[column].notna()]
        assert value["value"] == pytest.approx(of_bin[column].mean())
        for end in {"low", "high"} & value.keys():
            assert value[end] == pytest.approx(of_bin[f"{column}_{end}"].mean())
        seen += [(value["sae"], value["mask"], p) for p in of_bin["position"]]
    every = [
        (name, f"mask {row.mask}", row.position)
        for name in NAMES
        for row in tables[name]["positions"].itertuples()
        if math.isfinite(getattr(row, column))
    ]
    assert sorted(seen) == sorted(every)
    assert all("low" in value for value in values) == (f"{column}_low" in tables["plain"]["positions"])


def test_charts_of_order_removal_and_classes_equal_the_summaries(page, tables):
    for chart, table in (("order", "order"), ("removal", "removal")):
        values = [{**value, "sae": None} for value in values_of(page, chart)]
        expected = [line for name in NAMES for line in plain(tables[name]["summary"][table])]
        assert [{key: value[key] for key in line} for value, line in zip(values, expected, strict=True)] == expected
    values = values_of(page, "classes")
    assert len(values) == 4 * len(CLASSES)
    assert all(value["share"] == pytest.approx(value["count"] / D_SAE) for value in values)


def test_the_stream_is_drawn_once_for_saes_of_the_same_vectors(tmp_path):
    for name in ("a", "b"):
        write_audit(tmp_path, name)
    norms = panels_of(write_audit_page(tmp_path, ["a", "b"]))["mean norm of the stream"]
    assert [value["first position"] for value in norms] == list(range(1, N_POSITIONS))
    assert not any("sae" in value for value in norms)


def test_charts_leave_out_what_long_names_share(tmp_path):
    names = [f"some-release-of-many-saes-layer_12-width_16k-average_l0_{l0}" for l0 in (22, 82)]
    for name in names:
        write_audit(tmp_path, name)
    path = write_audit_page(tmp_path, names)
    assert {value["sae"] for value in panels_of(path)["explained variance"]} == {"…average_l0_22", "…average_l0_82"}
    assert [line[0][1] for line in Tables(path).rows["saes"][1:]] == names


def test_a_page_without_order_removal_and_beyond_says_so(root, tables, tmp_path):
    def steady(tables, summary):
        tables["positions"]["l0"] = 32.0
        tables["latents"].loc[0, ["peak_position", "q_value"]] = -1, math.nan
        tables["profiles"] = tables["profiles"][tables["profiles"]["latent"] > 0]

    write_audit(tmp_path, "bare", order=False, removal=False, change=steady)
    page = write_audit_page(tmp_path, ["bare"])
    text = page.read_text(encoding="utf8")
    assert "Not measured: no position-tracking latent fires often enough" in text
    assert "Not measured: the model reads no longer texts" in text
    assert 'id="order"' not in text
    assert "#order" not in text
    assert "L0 does not depend on position: 32.00 at all positions" in text
    assert "L0" not in panels_of(page)
    for name in ("order", "removal"):
        assert f'id="block-chart-{name}"' not in text


def test_rules_are_those_of_the_classification(page):
    text = page.read_text(encoding="utf8")
    for name, rule in {**CLASS_RULES, **KIND_RULES}.items():
        assert f"<dt>{name}</dt><dd>{rule}</dd>" in text
    assert set(CLASS_RULES) == set(CLASSES)
    assert set(KIND_RULES) == set(KINDS)


def test_the_page_loads_nothing_escapes_data_and_names_no_folder_of_this_machine(page):
    text = page.read_text(encoding="utf8")
    without_blocks = re.sub(r'<script type="application/octet-stream"[^>]*>[^<]*</script>', "", text)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", without_blocks)
    assert HOSTILE not in text
    assert "\u202e" not in text
    assert "/home/someone" not in text
    assert "A difference of −0.123 was found." in text


def test_only_finished_audits_and_pages_of_posmask_are_read_and_replaced(root, tables, tmp_path):
    with pytest.raises(DamagedFolder, match=r"no manifest\.json"):
        write_audit_page(root, ["unknown"])
    with write_folder(tmp_path / "evaluated" / "sae", {}) as draft:
        (draft / "rows.csv").write_text("")
    with pytest.raises(DamagedFolder, match="holds no audit: run `posmask audit` on the SAE"):
        write_audit_page(tmp_path, ["sae"])
    folder = shutil.copytree(root / "evaluated" / "bare", tmp_path / "evaluated" / "bare")
    (tmp_path / "audit.html").write_text("mine")
    with pytest.raises(BadSetting, match=r"audit\.html is a file, which posmask did not write"):
        write_audit_page(tmp_path, ["bare"])
    (folder / "positions.csv").write_text("mask,position\n")
    with pytest.raises(DamagedFolder, match=r"positions\.csv"):
        write_audit_figures(tmp_path, ["bare"], tmp_path / "figures")


def test_figures_are_svg_and_pdf(root, tables, tmp_path):
    paths = write_audit_figures(root, ["masked"], tmp_path / "figures")
    names = {"classes", "positions", "order", "removal"}
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in names for kind in ("svg", "pdf")}
    for name in names:
        ElementTree.parse(tmp_path / "figures" / f"{name}.svg")
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def drawn(tab):
    charts = "[...document.querySelectorAll('.chart')]"
    tab.wait_for_function(f"{charts}.every(chart => chart.querySelector('svg') || chart.matches('.failed'))")
    assert tab.evaluate(f"{charts}.filter(chart => chart.matches('.failed')).map(chart => chart.textContent)") == []


def test_latents_of_each_sae_have_an_address(page, tables, open_page):
    tab = open_page(f"{page.as_uri()}#cell=masked&latent=7")
    tab.wait_for_selector("text=Latent 7 of masked")
    latent = tables["masked"]["latents"].loc[7]
    header = tab.locator(".latent header").inner_text()
    assert latent["class"] in header
    assert f"position {latent['shift_position']:.2f}" in header
    profiles = tables["masked"]["profiles"]
    rates = profiles[(profiles["latent"] == 7) & (profiles["mask"] == "on")]["firing_rate"]
    tips = tab.locator("svg[aria-label='firing rate by position'] [data-tip]")
    told = [re.search(r"firing rate ([\d.]+) (%|ppm)", tip).groups() for tip in all_tips(tips)]
    scale = {"%": 0.01, "ppm": 1e-6}
    assert [float(number) * scale[unit] for number, unit in told] == pytest.approx(rates.tolist(), abs=6e-4)
    tab.select_option("#app select[aria-label^='Classes with the mask']", label="mask on")
    tab.select_option("#app select[aria-label=Class]", "mixed")
    assert (
        tab.locator("#app .note").first.inner_text()
        == f"{(tables['masked']['latents']['class'] == 'mixed').sum()} latents"
    )
    tab.select_option("#app select[aria-label=Cell]", "0")
    tab.wait_for_function("location.hash.startsWith('#cell=plain')")
    with tab.expect_download() as download:
        tab.locator("button[data-of-chart=order][data-save=csv]").click()
    assert "difference" in Path(download.value.path()).read_text(encoding="utf8")


def all_tips(values):
    return values.evaluate_all("all => all.map(element => element.dataset.tip)")


@pytest.mark.parametrize(("width", "scheme"), [(1024, "dark"), (390, "light")])
def test_the_page_is_accessible_and_fits(page, open_page, width, scheme):
    axe = pytest.importorskip("axe_core_python")
    tab = open_page(page, color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 844})
    drawn(tab)
    tab.locator("#app").scroll_into_view_if_needed()
    tab.wait_for_selector(".latent h3")
    tab.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(heading => Number(heading.tagName[1]))")
    assert levels[0] == 1
    assert max(np.diff(levels)) <= 1
    tab.add_script_tag(content=(Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf8"))
    violations = tab.evaluate("axe.run({exclude: ['.chart svg']}, {resultTypes: ['violations']})")["violations"]
    serious = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
    assert [(v["id"], [node["html"][:150] for node in v["nodes"][:3]]) for v in serious] == []


def test_print_clips_nothing(page, open_page):
    tab = open_page(page)
    drawn(tab)
    tab.locator("#app").scroll_into_view_if_needed()
    tab.wait_for_selector(".latent h3")
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 703, "height": 1000})  # A4 without margins, in CSS pixels
    assert tab.evaluate("document.documentElement.scrollWidth") <= 703
    too_wide = "[...document.querySelectorAll('table, .chart svg')].filter(e => e.getBoundingClientRect().right > 703)"
    assert tab.evaluate(f"{too_wide}.map(e => e.id || e.parentElement.dataset.chart)") == []
