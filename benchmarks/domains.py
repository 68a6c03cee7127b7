"""Domains, prompts and few shots measured side by side: ``python -m benchmarks.domains real|tailored|matrix|ablation``.

Every cell is one run of ``train.py`` in its own directory below ``--out``; finished cells are kept, so a benchmark
that was stopped goes on where it stopped. Each part prints its tables and writes them as Markdown, and the figures as
JSON; the matrix also draws a heat map. Dense and dense + LoRA are measured once for all cells that share their data.

Tables grow: cells that ``--results`` already holds from the same settings stay beside the new ones, so that ratios,
seeds and domains can be measured one after the other, on whatever machine has the time.

* ``real``: a checkpoint nobody here trained, on real legal and health files, at 20% and 50%: bits per byte with
  intervals of dense, dense + LoRA, two-stage Taylor (as published, and repaired as the joint run is) and joint.
* ``tailored``: Tailored-LLaMA's few-shot regime on the embedded base, two-stage and joint.
* ``matrix``: trained on one task (row), tested on all (column).
* ``ablation``: the collaborative prompt in training and at inference, 2x2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp.evaluate.intervals import Items, paired
from benchmarks import domains_report as report
from benchmarks.domains_report import CELLS, COMPARED, PRESETS

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REAL = {"legal": "legal_text", "health": "health_text"}  # folder of real files -> data preset
LEAN = ["evaluate.speed=false", "evaluate.samples=0", "export.verify=false"]  # what no table here shows


@dataclass(frozen=True)
class Options:
    """What the parts are run with.

    Attributes:
        out: Where cells and tables go.
        seeds: Seeds of each tailored preset; the other parts take the first.
        ratios: Shares of the block parameters to remove, of the parts that have several.
        overrides: Further settings of every run.
    """

    out: Path
    seeds: Sequence[int] = (0,)
    ratios: Sequence[float] = (0.2, 0.5)
    overrides: Sequence[str] = ()

    @property
    def settings(self) -> list[str]:
        """What sets a cell apart from others of its name, where the name does not tell the seed."""
        return [f"seed={self.seeds[0]}", *self.overrides]

    def run(self, name: str, *overrides: str) -> dict[str, Any]:
        """Metrics of one run, made now unless it is there."""
        folder = self.out / name
        metrics = folder / "metrics.json"
        if not metrics.is_file():
            place = f"resume={folder}" if (folder / "config.json").is_file() else f"run_dir={folder}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            log = folder.with_suffix(".log")
            shared = f"evaluate.shared={self.out / 'shared'}"
            settings = [*overrides, *LEAN, shared, f"name={name.replace('/', '_')}", *self.overrides, place]
            with log.open("a") as file:
                command = [sys.executable, str(ROOT / "train.py"), *settings]
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
            if done.returncode:
                raise SystemExit(f"{name} failed, see {log}")
        found: dict[str, Any] = json.loads(metrics.read_text())
        return found

    def against(self, name: str, stage: str, rival: tuple[str, str], metric: str) -> dict[str, Any] | None:
        """One stage of a finished run less another's, on the same items."""
        return paired(self.items(name, stage, metric), self.items(*rival, metric))

    def items(self, name: str, stage: str, metric: str) -> Items:
        """What each test item gave in one stage of a finished run."""
        result = json.loads((self.out / name / "stages" / f"{stage}.json").read_text())
        return Items.from_plain(result["items"][metric])


Cells = dict[str, dict[str, Any]]


def real(options: Options) -> Cells:
    """Bits per byte on held-out documents of real domains.

    The joint run repairs its two-stage baseline as itself; a second run has it as published, without any repair.
    """
    found: Cells = {}
    for (folder, data), ratio in itertools.product(REAL.items(), options.ratios):
        name = f"real/{folder}_{round(100 * ratio)}pct"
        same = [
            "model=local",
            f"model.path={SHARED / 'models' / 'stories3M'}",
            f"data={data}",
            f"data.path={SHARED / 'data' / folder}",
            "data.batch_size=8",
            "data.max_length=128",
            "data.max_test=200",
            f"prune.sparsity={ratio}",
            "evaluate.max_generate=8",
            f"seed={options.seeds[0]}",
            "optim.lr=0.005",
        ]
        metrics = options.run(name, "evaluate.baselines=[taylor]", *same)
        published = f"{name}_published"
        two_stage = options.run(published, "prune=taylor", "evaluate.baselines=[]", *same)
        kept = ("eval", "intervals", "eval_counts", "overlap", "forgetting")
        cell = {key: metrics[key] for key in kept}
        for key in ("eval", "intervals"):
            cell[key] = {**cell[key], "published": two_stage[key]["pruned"]}
        rivals = {"published": (published, "pruned"), "taylor": (name, "taylor")}
        cell["paired"] = {
            rival: options.against(name, "pruned", place, "bits_per_byte") for rival, place in rivals.items()
        }
        found[name] = {**cell, "settings": options.settings}
    return found


def tailored(options: Options) -> Cells:
    """Recovery with 50 examples."""
    found: Cells = {}
    presets = [preset for preset in PRESETS if float(preset[-5:-3]) / 100 in options.ratios]
    for preset, seed in itertools.product(presets, options.seeds):
        name = f"tailored/{preset}_{seed}"
        metrics = options.run(name, f"experiment={preset}", f"seed={seed}")
        kept = ("recovery_vs_dense", "recovery", "eval", "intervals", "eval_counts")
        rival = (name.replace("_joint", ""), "pruned")  # run before: presets stand in that order
        pairs = {key: options.against(name, "pruned", rival, key) for key in COMPARED} if "_joint" in preset else None
        found[name] = {**{key: metrics[key] for key in kept}, "paired": pairs, "settings": list(options.overrides)}
    return found


def matrix(options: Options) -> Cells:
    """Train on the row, test on the column."""
    found: Cells = {}
    for cell in CELLS:
        domain, task = cell.split("/")
        metrics = options.run(
            f"matrix/{domain}_{task}",
            "experiment=tailored_50pct",
            f"data=embedded_{domain}",
            f"data.tasks={{{task}: null}}",
            "data.shots=50",
            f"evaluate.tasks=[{','.join(CELLS)}]",
            "evaluate.reference=false",
            "evaluate.forgetting=[]",
            f"seed={options.seeds[0]}",
        )
        for row, model in (("dense", "dense"), (cell, "pruned")):
            scores = {column: 100 * _headline(metrics["tasks"][model][column]) for column in CELLS}
            items = {column: round(_headline(metrics["task_counts"][column])) for column in CELLS}
            found[f"matrix/{row}"] = {"scores": scores, "items": items, "settings": options.settings}
    return found


def _headline(values: Mapping[str, float]) -> float:
    return values["accuracy"] if "accuracy" in values else values["rougeL"]


def ablation(options: Options) -> Cells:
    """The collaborative prompt, 2x2."""
    found: Cells = {}
    neither = ("ablation/train_no_inference_no", "pruned")
    for train, inference in itertools.product((False, True), repeat=2):
        name = f"ablation/train_{'yes' if train else 'no'}_inference_{'yes' if inference else 'no'}"
        switches = [f"prompt.train={train}", f"prompt.inference={inference}", f"seed={options.seeds[0]}"]
        metrics = options.run(name, "experiment=ablation_prompt", *switches, "evaluate.reference=false")
        cost = {key: value for key, value in metrics["prompt"].items() if isinstance(value, int | float)}
        found[name] = {
            "eval": metrics["eval"]["pruned"],
            "intervals": metrics["intervals"]["pruned"],
            "prompt": cost,
            "paired": options.against(name, "pruned", neither, "perplexity") if train or inference else None,
            "settings": options.settings,
        }
    return found


def joined(path: Path, found: Cells) -> Cells:
    """Cells of an earlier table and these, which replace those of their name; other settings are left out, and told."""
    earlier: Cells = json.loads(path.read_text()) if path.is_file() else {}
    settings = next(iter(found.values()))["settings"]
    other = [name for name, cell in earlier.items() if cell.get("settings") != settings and name not in found]
    if other:
        print(f"left out of {path}, measured with other settings: {', '.join(other)}")
    return {**{name: cell for name, cell in earlier.items() if name not in other}, **found}


PARTS: dict[str, tuple[Callable[[Options], Cells], Callable[[report.Cells], list[str]]]] = {
    "real": (real, report.real),
    "tailored": (tailored, report.tailored),
    "matrix": (matrix, report.matrix),
    "ablation": (ablation, report.ablation),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/domains"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the tables, domains_PART.json and .md; unset: --out")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5], help="shares removed (real, tailored)")
    parser.add_argument("--quick", action="store_true", help="half of the block parameters only: --ratios 0.5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of tailored; other parts take the first")
    parser.add_argument("overrides", nargs="*", help="further settings of every run, e.g. trainer.max_steps=100")
    given = parser.parse_intermixed_args(arguments)
    ratios = (0.5,) if given.quick else given.ratios
    options = Options(given.out.resolve(), given.seeds, ratios, given.overrides)
    results = (given.results or given.out).resolve()
    for folder in (options.out, results):
        folder.mkdir(parents=True, exist_ok=True)
    for name in PARTS if given.part == "all" else [given.part]:
        measure, table = PARTS[name]
        path = results / f"domains_{name}.json"
        cells = joined(path, measure(options))
        lines = table(cells)
        print("\n".join([f"\n{name}", *lines]))
        path.write_text(json.dumps(cells, indent=1) + "\n")
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")
        if name == "matrix":
            report.heat_map(cells, options.out / "matrix.png")
            print(f"heat map: {options.out / 'matrix.png'}")


if __name__ == "__main__":
    main()
