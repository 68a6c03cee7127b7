"""Domains, prompts and few shots measured side by side: ``python -m benchmarks.domains real|tailored|matrix|ablation``.

Every cell is one run of ``train.py`` in its own directory below ``--out``; finished cells are kept, so a benchmark
that was stopped goes on where it stopped. Each part prints one table and writes it as JSON; the matrix also draws a
heat map.

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
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
CELLS = ("legal/clause", "legal/holding", "legal/bill", "health/inference")
MODELS = ("dense", "dense_lora", "taylor", "pruned")


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Metrics of one run, made now unless it is there."""
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        resume = [f"resume={folder}"] if (folder / "config.json").is_file() else [f"run_dir={folder}"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        command = [sys.executable, str(ROOT / "train.py"), *overrides, *resume]
        with log.open("a") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{folder.name} failed, see {log}")
    return json.loads(metrics.read_text())


def real(out: Path, extra: list[str], quick: bool) -> dict[str, Any]:
    """Bits per byte on held-out documents of real domains."""
    found: dict[str, Any] = {}
    ratios = (0.5,) if quick else (0.2, 0.5)
    for (data, folder), ratio in itertools.product((("legal_text", "legal"), ("health_text", "health")), ratios):
        name = f"{folder}_{round(100 * ratio)}pct"
        metrics = run(
            out / "real" / name,
            [
                "model=local",
                f"model.path={SHARED / 'models' / 'stories3M'}",
                f"data={data}",
                f"data.path={SHARED / 'data' / folder}",
                "data.batch_size=8",
                f"prune.sparsity={ratio}",
                f"name={name}",
                "evaluate.baselines=[taylor]",
                "evaluate.max_generate=8",
                "optim.lr=0.005",
                *extra,
            ],
        )
        print(f"\n{name}: bits per byte on {metrics['eval_counts']['bits_per_byte']:,} held-out bytes")
        for model in (m for m in MODELS if m in metrics["eval"]):
            value, bounds = metrics["eval"][model]["bits_per_byte"], metrics["intervals"][model]["bits_per_byte"]
            print(f"  {model:<12} {value:.3f}  [{bounds[0]:.3f}, {bounds[1]:.3f}]")
        tasks = {k: v for k, v in metrics["eval"]["pruned"].items() if k.endswith(("accuracy", "rougeL"))}
        for task in tasks:
            values = {m: round(metrics["eval"][m][task], 3) for m in MODELS if m in metrics["eval"]}
            print(f"  {task}: {values} {_chance(task, values)}")
        kept = ("eval", "intervals", "paired", "eval_counts", "overlap", "forgetting")
        found[name] = {key: metrics[key] for key in kept}
    return found


def _chance(task: str, values: dict[str, float]) -> str:
    chance = {"casehold/accuracy": 0.2, "pubmedqa/accuracy": 1 / 3}.get(task)
    near = chance is not None and all(abs(value - chance) < 0.07 for value in values.values())
    return "(near chance: tells nothing)" if near else ""


def tailored(out: Path, extra: list[str], quick: bool) -> dict[str, Any]:
    """Recovery with 50 examples."""
    goals = {"tailored_20pct": 95.68, "tailored_50pct": 86.54, "tailored_joint_50pct": 86.54}
    found = {}
    print("\nrecovery with 50 examples, in percent of dense / of dense + LoRA; Tailored-LLaMA's own figure beside it")
    for name, goal in goals.items():
        metrics = run(out / "tailored" / name, [f"experiment={name}", *extra])
        dense, tuned = metrics["recovery_vs_dense"]["mean"], metrics["recovery"]["mean"]
        print(f"  {name:<22} {dense:6.1f} / {tuned:6.1f}   goal {goal}")
        found[name] = {key: metrics[key] for key in ("eval", "recovery", "recovery_vs_dense", "paired", "eval_counts")}
    return found


def matrix(out: Path, extra: list[str], quick: bool) -> dict[str, Any]:
    """Train on the row, test on the column."""
    found: dict[str, dict[str, float]] = {}
    for cell in CELLS:
        domain, task = cell.split("/")
        overrides = [
            "experiment=tailored_50pct",
            f"data=embedded_{domain}",
            f"data.tasks={{{task}: null}}",
            "data.shots=50",
            f"evaluate.tasks=[{','.join(CELLS)}]",
            "evaluate.reference=false",
            "evaluate.forgetting=[]",
            f"name=matrix_{task}",
            *extra,
        ]
        scored = run(out / "matrix" / f"{domain}_{task}", overrides)["tasks"]
        found[cell] = {column: 100 * _headline(scored["pruned"][column]) for column in CELLS}
        found["dense"] = {column: 100 * _headline(scored["dense"][column]) for column in CELLS}
    print("\naccuracy or ROUGE-L in percent, pruned by half; trained on the row, tested on the column")
    print(" " * 18 + "".join(f"{column:>18}" for column in CELLS))
    for row, values in found.items():
        print(f"{row:<18}" + "".join(f"{values[column]:18.1f}" for column in CELLS))
    _heat_map(found, out / "matrix.png")
    return found


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
    axes.set_ylabel("pruned and tuned on")
    axes.set_title("Score by training task (%)")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 60 else "black")
    figure.colorbar(image, label="accuracy or ROUGE-L (%)")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"heat map: {path}")


def ablation(out: Path, extra: list[str], quick: bool) -> dict[str, Any]:
    """The collaborative prompt, 2x2."""
    found = {}
    print("\ncollaborative prompt: perplexity, mean score (accuracy and ROUGE-L, %), tokens added")
    for train, inference in itertools.product((False, True), repeat=2):
        name = f"train_{'yes' if train else 'no'}_inference_{'yes' if inference else 'no'}"
        overrides = ["experiment=ablation_prompt", f"prompt.train={train}", f"prompt.inference={inference}"]
        metrics = run(out / "ablation" / name, [*overrides, "evaluate.reference=false", *extra])
        values = metrics["eval"]["pruned"]
        scores = [value for key, value in values.items() if key.endswith(("accuracy", "rougeL"))]
        low, high = metrics["intervals"]["pruned"]["perplexity"]
        tokens = metrics["prompt"]["tokens_added"] if inference else 0
        mean = 100 * sum(scores) / len(scores)
        print(f"  {name:<28} {values['perplexity']:.4f} [{low:.4f}, {high:.4f}]  {mean:5.1f}  {tokens}")
        found[name] = {"eval": values, "intervals": metrics["intervals"]["pruned"], "prompt": metrics["prompt"]}
    return found


def main() -> None:
    """Entry point."""
    parts = {"real": real, "tailored": tailored, "matrix": matrix, "ablation": ablation}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*parts, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/domains"))
    parser.add_argument("--quick", action="store_true", help="half of the block parameters only")
    parser.add_argument("overrides", nargs="*", help="further settings of every run, e.g. trainer.max_steps=100")
    arguments = parser.parse_intermixed_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in parts if arguments.part == "all" else [arguments.part]:
        found = parts[name](out, arguments.overrides, arguments.quick)
        (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
