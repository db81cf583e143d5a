"""What `posmask doctor` reports about the installation and this machine."""

import importlib.metadata
import os
import platform
from typing import Any

from posmask.data import embedded
from posmask.kernels import runtime

__all__ = ["installation", "print_installation"]

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
    }


def print_installation(report: dict[str, Any]) -> None:
    """Print what `installation` returned, one fact per line."""
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
