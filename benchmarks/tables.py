"""results.json -> the tables of docs/performance.md."""

from rounds import is_wide

# What was set as the least: against sae-lens, and against the best peer.
GOALS = {
    "topk-float32": (10, 3),
    "topk-bf16-select": (16, 5),
    "mask-slice": (35, 12),
    "mask-cohort": (35, 12),
    "mask-contiguous": (30, 10),
    "mask-hard": (20, 7),
    "batchtopk": (12, 4),
    "matryoshka": (2.5, 2),
    "jumprelu": (2.5, 2),
    "gated": (2.5, 2),
    "relu-l1-float32": (2.5, 2),
    "relu-l1-bf16": (4, 3),
}


def _ratio(row: dict, digits: int = 1) -> str:
    spread = f"{row['low']:.{digits}f}–{row['high']:.{digits}f}{', wide' * is_wide(row)}"
    return f"{row['ratio']:.{digits}f} ({spread})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _steps(ratios: list[dict]) -> str:
    rows = []
    for shape in ("576x4608", "576x16384", "2304x9216"):
        for work, (goal, best_goal) in GOALS.items():
            here = [row for row in ratios if row["work"] == work and row["shape"] == shape and "setting" not in row]
            peers = {row["peer"]: row for row in here if row["peer"] != "gemm-floor"}
            if "sae-lens" not in peers:
                continue
            best = min(peers.values(), key=lambda row: row["peer_ms"])
            floor = next((row for row in here if row["peer"] == "gemm-floor"), None)
            share = f"{100 * floor['ratio']:.0f} %" if floor and "float32" in work and "topk" in work else ""
            theirs = peers["sae-lens"]
            cells = [work, shape, f"{theirs['ours_ms']:.0f}", _ratio(theirs), f"{goal:g}", best["peer"], _ratio(best)]
            rows.append([*cells, f"{best_goal:g}", share, str(theirs["rounds"])])
    head = ["work", "shape", "ours, ms", "times faster than sae-lens", "asked", "best peer", "times faster", "asked"]
    return _table([*head, "share of the floor", "rounds"], rows)


def _tuned(ratios: list[dict]) -> str:
    rows = [
        [row["work"], row["shape"], row["peer"], f"{row['peer_ms']:.0f}", _ratio(row)]
        for row in ratios
        if "setting" in row and not row["work"].startswith("harvest")
    ]
    return _table(["work", "shape", "peer", "its step, ms", "times faster"], rows)


def _memory(ratios: list[dict]) -> str:
    rows = []
    for row in ratios:
        if row["work"] not in ("topk-float32", "mask-slice") or "setting" in row or row["peer"] == "gemm-floor":
            continue
        own, other = row["ours_peak_mb"], row["peer_peak_mb"]
        rows.append([row["work"], row["shape"], row["peer"], str(own), str(other), f"{own / other:.2f}"])
    return _table(["work", "shape", "peer", "ours, MB", "theirs, MB", "ours / theirs"], rows)


def _harvest(ratios: list[dict]) -> str:
    rows = []
    for row in ratios:
        if row["work"].startswith("harvest"):
            peer = {"bare-forward": "bare forward"}.get(row["peer"], row["peer"])
            peer += " in bfloat16" if "setting" in row else ""
            stored = f"{row['ours_bytes_a_token']} / {row.get('peer_bytes_a_token', '–')}"
            rows.append(
                [
                    row["work"],
                    peer,
                    str(row["ours_tokens_a_second"]),
                    _ratio(row, 2),
                    stored,
                ]
            )
    return _table(["work", "against", "ours, tokens/s", "times faster", "bytes a token, ours / theirs"], rows)


def _probing(ratios: list[dict]) -> str:
    rows = [
        [
            row["shape"],
            f"{row['ours_ms'] / 1000:.3f}",
            f"{row['peer_ms'] / 1000:.1f}",
            _ratio(row),
            f"{row['ours_accuracy']:.4f} / {row['peer_accuracy']:.4f}",
        ]
        for row in ratios
        if row["work"] == "probing"
    ]
    return _table(["shape", "ours, s", "sae-bench, s", "times faster", "mean accuracy, ours / theirs"], rows)


def _scaling(scaling: list[dict]) -> str:
    rows = [
        [row["by"], row["work"], row["shape"], str(row["threads"]), f"{row['ms']:.0f}", f"{row['best_ms']:.0f}"]
        for row in scaling
    ]
    return _table(["by", "work", "shape", "threads", "ms, median", "ms, best"], rows)


def _profile(profile: list[dict]) -> str:
    if not profile:
        return ""
    rows = [[part, *(f"{row['ms'][part]:.1f}" for row in profile)] for part in profile[0]["ms"]]
    totals = ["the step", *(f"{sum(row['ms'].values()):.1f}" for row in profile)]
    return _table([f"ms a step at {profile[0]['shape']}", *(row["work"] for row in profile)], [*rows, totals])


def tables(results: dict) -> dict[str, str]:
    """The text of each table by its name in the page."""
    ratios = results["ratios"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if name != "features")
    features = " ".join(results["machine"].get("features", []))
    return {
        "machine": f"{machine}; {features}.\n\n{versions}.",
        "steps": _steps(ratios),
        "tuned": _tuned(ratios),
        "memory": _memory(ratios),
        "harvest": _harvest(ratios),
        "probing": _probing(ratios),
        "scaling": _scaling(results["scaling"]),
        "profile": _profile(results["profile"]),
    }
