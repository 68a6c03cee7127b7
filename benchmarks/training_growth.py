"""How the cost of a joint step grows: time and memory against layers, width, sequence length and number of units.

One size varies at a time from a common middle. Each curve gets a power law (least squares on logarithms) and a straight
line; points, fits and plot go into the results.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training_memory import saved_activations
from benchmarks.training_systems import Shape, Workload, fit

MIDDLE = Shape("middle", 256, 4, 4, 2, 704, 2048, 2, 256)
SWEEPS: dict[str, list[int]] = {
    "layers": [2, 4, 6, 8, 12],
    "width": [128, 192, 256, 384, 512],
    "tokens": [64, 128, 256, 512, 1024],
    "units": [256, 512, 1024, 2048, 4096],
}
"""Sizes of every sweep; ``units`` are FFN channels per layer at a block of otherwise equal size."""


def shape_of(sweep: str, size: int) -> Shape:
    """The middle shape with one size changed; a wider model has more heads and channels in proportion."""
    if sweep == "layers":
        return replace(MIDDLE, layers=size)
    if sweep == "tokens":
        return replace(MIDDLE, tokens=size)
    if sweep == "units":
        return replace(MIDDLE, channels=size)
    return replace(MIDDLE, hidden=size, heads=size // 64, kv_heads=max(size // 128, 1), channels=size * 11 // 4)


def growth_section(picture: Path, clock: str = "wall", *, quick: bool = False) -> dict[str, Any]:
    """Measure all sweeps, fit and plot them."""
    points: dict[str, list[dict[str, float]]] = {}
    for sweep, sizes in SWEEPS.items():
        points[sweep] = [_measure(shape_of(sweep, size), size, clock) for size in (sizes[:3] if quick else sizes)]
    fits = {}
    for sweep, rows in points.items():
        sizes_of = [row["size"] for row in rows]
        for what in ("step_ms", "activations_mib"):
            fits[f"{what} against {sweep}"] = fit_growth(sizes_of, [row[what] for row in rows])
    _plot(points, fits, picture)
    return {"points": points, "fits": fits}


def _measure(shape: Shape, size: int, clock: str) -> dict[str, float]:
    work = Workload(shape)
    module = work.system("joint")
    batches = work.batches(7)
    kept = saved_activations(module, batches[0]) / 2**20
    seconds = min(fit(module, batches, clock=clock)[2:])
    return {"size": size, "units": module.space.num_units, "step_ms": 1e3 * seconds, "activations_mib": kept}


def fit_growth(sizes: list[float], values: list[float]) -> dict[str, float]:
    """Exponent of the power law through the points, and the straight line with its share of explained variance."""
    x, y = np.array(sizes, dtype=float), np.array(values, dtype=float)
    exponent = float(np.polyfit(np.log(x), np.log(y), 1)[0])
    slope, intercept = np.polyfit(x, y, 1)
    unexplained = float(((y - slope * x - intercept) ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-30))
    return {"exponent": exponent, "slope": float(slope), "intercept": float(intercept), "linear_r2": 1 - unexplained}


def _plot(points: dict[str, list[dict[str, float]]], fits: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(points), figsize=(3.2 * len(points), 5.6), squeeze=False)
    for column, (sweep, rows) in enumerate(points.items()):
        sizes = np.array([row["size"] for row in rows])
        for line, (what, label) in enumerate((("step_ms", "step, ms"), ("activations_mib", "activations kept, MiB"))):
            axis, law = axes[line][column], fits[f"{what} against {sweep}"]
            axis.plot(sizes, [row[what] for row in rows], "o")
            axis.plot(sizes, law["slope"] * sizes + law["intercept"], "-", linewidth=1)
            axis.set_title(f"~ {sweep}^{law['exponent']:.2f}", fontsize=9)
            axis.set_xlabel(sweep)
            axis.set_ylabel(label if column == 0 else "")
            axis.set_ylim(bottom=0)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
