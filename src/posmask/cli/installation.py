"""What `posmask doctor` reports about the installation and this machine."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from posmask.cli.printing import print_wrapped
from posmask.data import embedded
from posmask.kernels import runtime

__all__ = ["installation", "print_installation"]

_FREE_GB = 2.0
"""Free disk space below which the verdict warns: downloads, the converted model and a small study."""

_PACKAGES = ("posmask", "torch", "transformers", "numba", "numpy", "scikit-learn")


def installation() -> dict[str, Any]:
    """Versions, processors, measured matrix products and the state of the cache, as `posmask doctor --json` prints."""
    return {
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "gflops": {name: runtime.product_rate(name) / 1e9 for name in ("float32", "bfloat16")},
        "float32_is_exact": runtime.float32_stays_float32(),
        "precision": runtime.fast_precision(),
        "cache": str(embedded.cache_folder()),
        "downloads": [
            {
                "package": carrier.package,
                "version": carrier.version,
                "holds": carrier.holds,
                "megabytes": carrier.wheel_megabytes,
                "cached": (embedded.cache_folder() / "carriers" / f"{carrier.package}-{carrier.version}.whl").exists(),
            }
            for carrier in embedded.CARRIERS
        ],
        "problems": [*_unmet_requirements(), *_disk_problems(embedded.cache_folder())],
    }


def _unmet_requirements() -> list[str]:
    """Required packages that are missing or have another version than posmask needs."""
    problems = []
    for text in importlib.metadata.requires("posmask") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed: pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} is {version}: pip install '{requirement}'")
    return problems


def _disk_problems(cache: Path) -> list[str]:
    """Why downloads could not be stored."""
    folder = next(parent for parent in (cache, *cache.absolute().parents) if parent.is_dir())
    problems = [] if os.access(folder, os.W_OK) else [f"{folder} is not writable: set POSMASK_CACHE"]
    free = shutil.disk_usage(folder).free / 1e9
    if free < _FREE_GB:
        problems.append(f"only {free:.1f} GB are free in {folder}: free {_FREE_GB:.0f} GB, or set POSMASK_CACHE")
    return problems


def _verdict(report: dict[str, Any]) -> str:
    """Whether posmask can work here, in one sentence."""
    if report["problems"]:
        return f"Not ready: {'; '.join(report['problems'])}."
    megabytes = sum(download["megabytes"] for download in report["downloads"] if not download["cached"])
    if megabytes:
        return f"Ready, after a download of {megabytes} MB, which `posmask fetch` or the first run does."
    return "Ready: all packages fit, and the embedded model and texts are downloaded."


def print_installation(report: dict[str, Any]) -> None:
    """Print what `installation` returned, one fact per line, and a verdict."""
    exact = "float32 stays float32 in the fast product" if report["float32_is_exact"] else "fast product is off"
    rates = report["gflops"]
    facts = {
        **report["versions"],
        "python": report["python"],
        "processors": report["processors"],
        "products": f"float32 {rates['float32']:.0f} GFLOP/s ({exact}), bfloat16 {rates['bfloat16']:.0f} GFLOP/s",
        "precision": f"auto means {report['precision']} on this processor",
        "cache": report["cache"],
    }
    for download in report["downloads"]:
        state = "in the cache" if download["cached"] else f"would be downloaded, {download['megabytes']} MB"
        facts[download["package"]] = f"{download['version']}: {download['holds']} ({state})"
    for name, fact in facts.items():
        print(f"{name:<14} {fact}")
    print()
    print_wrapped(_verdict(report))
