"""Domains, prompts and few shots measured side by side: ``python -m benchmarks.domains real|tailored|matrix|ablation``.

Every cell is one run of ``train.py`` in its own directory below ``--out``; finished cells are kept, so a benchmark
that was stopped goes on where it stopped. Each part prints its tables and writes them as Markdown, and the figures as
JSON; the matrix also draws a heat map. Dense and dense + LoRA are measured once for all cells that share their data.

* ``real``: a checkpoint nobody here trained, on real legal and health files, at 20% and 50%: bits per byte with
  intervals of dense, dense + LoRA, two-stage Taylor and joint.
* ``tailored``: Tailored-LLaMA's few-shot regime on the embedded base, two-stage and joint.
* ``matrix``: trained on one task (row), tested on all (column).
* ``ablation``: the collaborative prompt in training and at inference, 2x2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atp.evaluate.intervals import Items, paired

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
CELLS = ("legal/clause", "legal/holding", "legal/bill", "health/inference")
MODELS = {"dense": "dense", "dense_lora": "dense + LoRA", "taylor": "two-stage", "pruned": "joint"}
REAL = {"legal": "legal_text", "health": "health_text"}  # folder of real files -> data preset
LEAN = ["evaluate.speed=false", "evaluate.samples=0", "export.verify=false"]  # what no table here shows
PRESETS = {  # preset -> Tailored-LLaMA's own recovery at that ratio, in percent
    "tailored_20pct": 95.7,
    "tailored_joint_20pct": 95.7,
    "tailored_50pct": 86.6,
    "tailored_joint_50pct": 86.6,
}


@dataclass(frozen=True)
class Options:
    """What the parts are run with.

    Attributes:
        out: Where cells and tables go.
        seeds: Seeds of each tailored preset; the other parts take the first.
        quick: Half of the block parameters only.
        overrides: Further settings of every run.
    """

    out: Path
    seeds: Sequence[int] = (0,)
    quick: bool = False
    overrides: Sequence[str] = ()

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

    def items(self, name: str, stage: str, metric: str) -> Items:
        """What each test item gave in one stage of a finished run."""
        result = json.loads((self.out / name / "stages" / f"{stage}.json").read_text())
        return Items.from_plain(result["items"][metric])


Found = tuple[dict[str, Any], list[str]]


def real(options: Options) -> Found:
    """Bits per byte on held-out documents of real domains."""
    found: dict[str, Any] = {}
    lines = ["| domain, removed | model | bits per byte | 95% interval | against two-stage, same documents |"]
    lines += ["|---|---|---|---|---|"]
    tasks: list[str] = []
    ratios = (0.5,) if options.quick else (0.2, 0.5)
    for (folder, data), ratio in itertools.product(REAL.items(), ratios):
        name = f"real/{folder}_{round(100 * ratio)}pct"
        metrics = options.run(
            name,
            "model=local",
            f"model.path={SHARED / 'models' / 'stories3M'}",
            f"data={data}",
            f"data.path={SHARED / 'data' / folder}",
            "data.batch_size=8",
            "data.max_length=128",
            "data.max_test=200",
            f"prune.sparsity={ratio}",
            "evaluate.baselines=[taylor]",
            "evaluate.max_generate=8",
            f"seed={options.seeds[0]}",
            "optim.lr=0.005",
        )
        stages = {"dense": "dense", "dense_lora": "dense_lora", "taylor": "taylor", "pruned": "pruned"}
        rival = options.items(name, "taylor", "bits_per_byte")
        for model, stage in stages.items():
            value, bounds = metrics["eval"][model]["bits_per_byte"], metrics["intervals"][model]["bits_per_byte"]
            pair = paired(options.items(name, stage, "bits_per_byte"), rival) if model == "pruned" else None
            beside = f"{pair['difference']:+.4f} ± {pair['half_width']:.4f}" if pair else ""
            label = f"{folder}, {ratio:.0%}" if model == "dense" else ""
            lines.append(f"| {label} | {MODELS[model]} | {value:.3f} | {bounds[0]:.3f} to {bounds[1]:.3f} | {beside} |")
        tasks += _task_lines(f"{folder}, {ratio:.0%}", metrics)
        kept = ("eval", "intervals", "eval_counts", "overlap", "forgetting")
        found[name] = {key: metrics[key] for key in kept}
    head = ["| domain, removed | score | items | " + " | ".join(MODELS.values()) + " | |", "|---" * 8 + "|"]
    return found, [*lines, "", "Task scores, reported though they tell little at this size:", "", *head, *tasks]


def _task_lines(label: str, metrics: dict[str, Any]) -> list[str]:
    chances = {"casehold/accuracy": 0.2, "pubmedqa/accuracy": 1 / 3}
    lines = []
    for task in (key for key in metrics["eval"]["pruned"] if key.endswith(("accuracy", "rougeL"))):
        values = [metrics["eval"][model][task] for model in MODELS]
        chance = chances.get(task)
        near = chance is not None and all(abs(value - chance) < 0.07 for value in values)
        told = f"near chance ({chance:.0%})" if near else ""
        scores = " | ".join(f"{100 * value:.1f}" for value in values)
        lines.append(f"| {label} | {task} | {metrics['eval_counts'][task]} | {scores} | {told} |")
    return lines


def tailored(options: Options) -> Found:
    """Recovery with 50 examples."""
    found: dict[str, Any] = {}
    lines = ["| preset | recovery of dense | of dense + LoRA | accuracy | perplexity | Tailored-LLaMA's own |"]
    lines += ["|---|---|---|---|---|---|"]
    for preset, goal in PRESETS.items():
        cells = {f"tailored/{preset}_{seed}": seed for seed in options.seeds}
        runs = [options.run(name, f"experiment={preset}", f"seed={seed}") for name, seed in cells.items()]
        figures = {
            "recovery_vs_dense": [run["recovery_vs_dense"]["mean"] for run in runs],
            "recovery": [run["recovery"]["mean"] for run in runs],
            "accuracy": [100 * run["eval"]["pruned"]["holding/accuracy"] for run in runs],
            "perplexity": [run["eval"]["pruned"]["perplexity"] for run in runs],
        }
        shown = [_spread(figures[key], 3 if key == "perplexity" else 1) for key in figures]
        lines.append(f"| `{preset}` | {shown[0]} | {shown[1]} | {shown[2]} | {shown[3]} | {goal} |")
        found[preset] = {**figures, "eval": [run["eval"] for run in runs], "items": runs[0]["eval_counts"]}
    lines += ["", f"Mean ± standard deviation over the seeds {', '.join(map(str, options.seeds))}."]
    for ratio in ("20", "50"):
        for metric, unit in (("holding/accuracy", 100), ("perplexity", 1)):
            pairs = [
                paired(
                    options.items(f"tailored/tailored_joint_{ratio}pct_{seed}", "pruned", metric),
                    options.items(f"tailored/tailored_{ratio}pct_{seed}", "pruned", metric),
                )
                for seed in options.seeds
            ]
            shown = [f"{unit * p['difference']:+.3g} ± {unit * p['half_width']:.2g}" for p in pairs if p]
            lines.append(f"Joint against two-stage at {ratio}%, {metric}, same items, by seed: {', '.join(shown)}.")
    return found, lines


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def matrix(options: Options) -> Found:
    """Train on the row, test on the column."""
    found: dict[str, dict[str, float]] = {}
    for cell in CELLS:
        domain, task = cell.split("/")
        scored = options.run(
            f"matrix/{domain}_{task}",
            "experiment=tailored_50pct",
            f"data=embedded_{domain}",
            f"data.tasks={{{task}: null}}",
            "data.shots=50",
            f"evaluate.tasks=[{','.join(CELLS)}]",
            "evaluate.reference=false",
            "evaluate.forgetting=[]",
            f"seed={options.seeds[0]}",
        )["tasks"]
        found["dense"] = {column: 100 * _headline(scored["dense"][column]) for column in CELLS}
        found[cell] = {column: 100 * _headline(scored["pruned"][column]) for column in CELLS}
    lines = ["| trained on \\ tested on | " + " | ".join(CELLS) + " |", "|---" * (1 + len(CELLS)) + "|"]
    for row, values in found.items():
        lines.append(f"| {row} | " + " | ".join(f"{values[column]:.1f}" for column in CELLS) + " |")
    _heat_map(found, options.out / "matrix.png")
    return found, lines


def _headline(values: dict[str, float]) -> float:
    return values.get("accuracy", values.get("rougeL", float("nan")))


def _heat_map(found: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = [[found[row][column] for column in CELLS] for row in found]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(CELLS)), CELLS, rotation=20, ha="right")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_xlabel("tested on")
    axes.set_ylabel("pruned by half and tuned on")
    axes.set_title("Score by training task (%)")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black")
    figure.colorbar(image, label="accuracy or ROUGE-L (%)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"heat map: {path}")


def ablation(options: Options) -> Found:
    """The collaborative prompt, 2x2."""
    found: dict[str, Any] = {}
    lines = ["| prompt in training | at inference | perplexity | 95% interval | against neither, same items |"]
    lines[0] += " mean score, % | tokens added |"
    lines.append("|---" * 7 + "|")
    names = {
        (train, inference): f"ablation/train_{'yes' if train else 'no'}_inference_{'yes' if inference else 'no'}"
        for train, inference in itertools.product((False, True), repeat=2)
    }
    for (train, inference), name in names.items():
        switches = [f"prompt.train={train}", f"prompt.inference={inference}", f"seed={options.seeds[0]}"]
        metrics = options.run(name, "experiment=ablation_prompt", *switches, "evaluate.reference=false")
        values = metrics["eval"]["pruned"]
        scores = [value for key, value in values.items() if key.endswith(("accuracy", "rougeL"))]
        low, high = metrics["intervals"]["pruned"]["perplexity"]
        tokens = metrics["prompt"]["tokens_added"] if inference else 0
        own, neither = (options.items(one, "pruned", "perplexity") for one in (name, names[False, False]))
        pair = paired(own, neither) if train or inference else None
        beside = f"{pair['difference']:+.4f} ± {pair['half_width']:.4f}" if pair else ""
        where = f"{'yes' if train else 'no'} | {'yes' if inference else 'no'}"
        mean = 100 * sum(scores) / len(scores)
        lines.append(
            f"| {where} | {values['perplexity']:.4f} | {low:.4f} to {high:.4f} | {beside} | {mean:.1f} | {tokens:g} |"
        )
        cost = {key: value for key, value in metrics["prompt"].items() if isinstance(value, int | float)}
        found[name] = {"eval": values, "intervals": metrics["intervals"]["pruned"], "prompt": cost, "paired": pair}
    return found, lines


def main() -> None:
    """Entry point."""
    parts = {"real": real, "tailored": tailored, "matrix": matrix, "ablation": ablation}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*parts, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/domains"))
    parser.add_argument("--quick", action="store_true", help="half of the block parameters only")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of each tailored preset")
    parser.add_argument("overrides", nargs="*", help="further settings of every run, e.g. trainer.max_steps=100")
    arguments = parser.parse_intermixed_args()
    options = Options(arguments.out.resolve(), arguments.seeds, arguments.quick, arguments.overrides)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in parts if arguments.part == "all" else [arguments.part]:
        found, lines = parts[name](options)
        print("\n".join([f"\n{name}", *lines]))
        (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
