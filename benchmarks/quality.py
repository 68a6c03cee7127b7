"""Every method side by side: same data, steps, adapters, budget, removal and evaluation; quality against size.

Rates are chosen by validation loss on the first seed, the other seeds run at the chosen rate. Finished cells are kept,
so an interrupted benchmark goes on where it stopped. Prints a table and writes it beside JSON and a plot.

    python -m benchmarks.quality --quick                     under ten minutes on two cores
    python -m benchmarks.quality                             everything (hours)
    python -m benchmarks.quality --settings stories3M --sparsities 0.5 --methods exact taylor
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from atp.atomic import write_json
from benchmarks.quality_cells import ARMS, CONTROL, REFERENCES, Cell, run_cell
from benchmarks.quality_data import SETTINGS, prepare
from benchmarks.quality_report import TWO_STAGE, best_rate, is_two_stage, plot, summarise, table, targets

FOLDER = Path(__file__).parent / "results" / "quality"
DEFAULT = "exact"
JOINT = (DEFAULT, "l0", "atp", "atp_joint", "compresso", "disp_llm")
METHODS = (*JOINT, "loraprune", *TWO_STAGE)

log = logging.getLogger("benchmarks.quality")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then report on everything that is there."""
    options = _options(arguments)
    _quiet()
    if options.threads:
        torch.set_num_threads(options.threads)
    checks: dict[str, Any] = {}
    if not options.report_only:
        for name in options.settings:
            setting = SETTINGS[name]
            base, checks[name] = prepare(setting, options.output / "data", options.sibling)
            log.info("%s: overlap of training and held-out text: %s", name, checks[name])
            for number, result in enumerate(_results(name, base, options), 1):
                cell = result["cell"]
                log.info("%d %s loss %.4f (%.0f s)", number, Cell(**cell).key, result["loss"], result["seconds"])
    report(options.output, options, checks)


def report(folder: Path, options: argparse.Namespace, checks: dict[str, Any]) -> None:
    """Summarise the finished cells of the chosen settings."""
    paths = sorted(path for path in (folder / "cells").glob("*.json") if not path.name.endswith(".masks.json"))
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    cells = [cell for cell in cells if cell["cell"]["setting"] in options.settings]
    if not cells:
        raise SystemExit(f"no finished cell of {', '.join(options.settings)} in {folder / 'cells'}")
    rows = summarise(cells)
    lines = targets(rows, DEFAULT)
    text = table(rows) + "\n\n" + "\n".join(lines) + "\n"
    print(text)
    write_json(folder / "quality.json", {"rows": rows, "targets": lines, "overlap": checks, "torch": torch.__version__})
    (folder / "quality.md").write_text(text, encoding="utf-8")
    plot(rows, folder / "quality.png")
    print(f"{len(cells)} cells; written: {folder}/quality.json, quality.md, quality.png")


def _results(setting: str, base: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of all cells of a setting, references first."""
    for method in ("dense", "dense_lora"):
        yield from _at_best_rate(Cell(setting, 0.0, method, "", 0.0, 0, options.steps), base, options)
    for sparsity in options.sparsities:
        for arm in options.arms:
            here: list[dict[str, Any]] = []
            for method in [*options.methods, *([CONTROL] if DEFAULT in options.methods else [])]:
                here += _at_best_rate(Cell(setting, sparsity, method, arm, 0.0, 0, options.steps), base, options)
                yield from here[-len(options.seeds) :]
            if options.match_time:
                yield from _at_equal_time(here, base, options)
        if not options.quick:
            yield from _at_best_rate(Cell(setting, sparsity, "scratch", "", 0.0, 0, options.steps), base, options)


def _at_best_rate(which: Cell, base: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The grid of rates on the first seed, then the other seeds at the best of them."""
    rates = options.rates or SETTINGS[which.setting].rates

    def run(lr: float, seed: int) -> dict[str, Any]:
        source = None
        if which.method == CONTROL:
            grid = [replace(which, method=DEFAULT, lr=rate, seed=options.seeds[0]) for rate in rates]
            chosen = best_rate([run_cell(cell, base, options.output) for cell in grid])
            source = replace(which, method=DEFAULT, lr=chosen, seed=seed)
        return run_cell(replace(which, lr=lr, seed=seed), base, options.output, masks_of=source)

    first = [run(lr, options.seeds[0]) for lr in (rates[:1] if which.method == "dense" else rates)]
    chosen = best_rate(first)
    return first + [run(chosen, seed) for seed in options.seeds[1:]]


def _at_equal_time(here: list[dict[str, Any]], base: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The best two-stage method again, with as many more steps as the default preset took more time."""
    rows = summarise(here)
    mine = next((row for row in rows if row["method"] == DEFAULT), None)
    rivals = [row for row in rows if is_two_stage(row["method"])]
    if mine is None or not rivals:
        return []
    best = min(rivals, key=lambda row: row["loss"])
    ratio = mine["fit_seconds"] / best["fit_seconds"]
    steps = round(ratio * _steps(base, options))
    if steps <= _steps(base, options):
        return []
    cell = Cell(best["setting"], best["sparsity"], best["method"], best["arm"], best["lr"], 0, steps)
    return [run_cell(replace(cell, seed=seed), base, options.output) for seed in options.seeds]


def _steps(base: list[str], options: argparse.Namespace) -> int:
    own = next(part.partition("=")[2] for part in base if part.startswith("trainer.max_steps="))
    return options.steps or int(own)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="stories260K at 50%%, few methods, two seeds, one rate")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="base models and texts")
    parser.add_argument("--sparsities", nargs="+", type=float, help="fractions of block parameters to remove")
    parser.add_argument("--methods", nargs="+", help=f"presets of conf/prune, besides {', '.join(REFERENCES)}")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "plain"], help="what is added to every method")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates, instead of the setting's grid")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds; the first chooses the rate")
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of the setting's")
    parser.add_argument("--sibling", type=Path, help="a larger base (atp.embedded.pretrain --larger)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--match-time", action="store_true", help="also run the best two-stage method for equal time")
    parser.add_argument("--report-only", action="store_true", help="run nothing, summarise what is there")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of cells and results")
    options = parser.parse_args(arguments)
    quick = options.quick
    usual: dict[str, Any] = {
        "settings": ["stories260K"] if quick else [name for name in SETTINGS if name != "sibling" or options.sibling],
        "sparsities": [0.5] if quick else [0.2, 0.4, 0.5],
        "methods": [DEFAULT, "taylor", "random_uniform"] if quick else list(METHODS),
        "arms": ["plain"] if quick else ["plain", *filter(None, ARMS)],
        "seeds": [0, 1] if quick else [0, 1, 2],
        "rates": [1e-2] if quick else None,
        "steps": 200 if quick else None,
    }
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.arms = ["" if arm == "plain" else arm for arm in options.arms]
    return options


def _quiet() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


if __name__ == "__main__":
    main()
