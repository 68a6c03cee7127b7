"""From stage results to ``metrics.json`` and the final model card.

Sits between the pipeline's stages and everything that reads a finished run. Knows the stages' results as plain data and
the stable keys of ``metrics.json``; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atp.atomic import write_text
from atp.config.schema import TrainConfig
from atp.errors import UserError
from atp.evaluate.intervals import Items, paired
from atp.evaluate.metrics import recovery
from atp.export.hf.card import CardFacts, base_license, model_card
from atp.model.widths import LayerWidths
from atp.prepare.baselines import BASELINES

FORMAT = 1
MODELS = ("dense", "dense_lora", "pruned", *BASELINES)


def assemble(
    results: Mapping[str, dict[str, Any]],
    *,
    before: Mapping[str, float] | None = None,
    config: TrainConfig,
    origin: Mapping[str, Any],
    data: Mapping[str, Any],
    dense_parameters: int,
    dense_blocks: int,
    dense_widths: list[dict[str, int]],
    device: str,
    prompt: Mapping[str, Any] | None = None,
    overlap: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``metrics.json``.

    Args:
        results: Results of the stages by name.
        before: Seconds by part before the first stage.
        config: The run's configuration.
        origin: Command, git commit, versions, start.
        data: Name of the data and counts per split.
        dense_parameters: All parameters of the dense model.
        dense_blocks: Its decoder-block parameters (embeddings, lm_head and norms excluded).
        dense_widths: Its widths per layer.
        device: Where the run computed.
        prompt: What stood around the records' prompts (``Prompt.plain``).
        overlap: What the checks across splits found (``Splits.overlap``).
    """
    fit, export, cost = results["fit"], results["export"], results["cost"]
    values = {name: results[name]["values"] for name in MODELS if name in results}
    metrics: dict[str, Any] = {
        "format": FORMAT,
        "run": {
            **_run(results, config, device),
            "parts": _seconds_by_part(results, before or {}),
            "data": dict(data),
            **origin,
        },
        "sparsity": {
            "target": config.prune.sparsity,
            "blocks": export["sparsity"],
            "model": 1.0 - export["parameters"] / dense_parameters,
            **{f"{name}_at_freeze": value for name, value in export.get("at_freeze", {}).items()},
        },
        "parameters": {
            "dense": dense_parameters,
            "pruned": export["parameters"],
            "dense_blocks": dense_blocks,
            "pruned_blocks": export["pruned_blocks"],
        },
        "removal": _removal(export),
        "export": {
            **{key: export[key] for key in ("stock", "architecture")},
            "adapter": export.get("adapter", False),
            "formats": export.get("formats", []),
        },
        "memory": {key: fit[key] for key in ("train_peak_mib", "steps_peak_mib") if key in fit} | cost["memory"],
        "prompt": {**(prompt or {}), **cost.get("prompt", {})},
        "overlap": dict(overlap or {}),
        "widths": export["widths"],
        "dense_widths": dense_widths,
        **{key: cost[key] for key in ("macs", "files", "speed") if key in cost},
    }
    return metrics | _quality(results, values) | _certainty(results, config) | _beyond_the_target(results)


def _removal(export: Mapping[str, Any]) -> dict[str, Any]:
    """How far masked, removed and reloaded model lie apart, and what is not verified; empty text where all is."""
    names = ("max_abs_logit_diff", "masked_vs_removed", "removed_vs_reloaded", "masked_vs_reloaded", "logit_spread")
    found = {key: export[key] for key in (*names, "dtype", "stored_dtype", "tokens") if key in export}
    faults = [export["fault"]] if export.get("fault") else []
    faults += [f"{check['format']}: {check['note']}" for check in export.get("formats", ()) if check["ok"] is False]
    return {**found, "not_verified": "; ".join(faults)}


def _run(results: Mapping[str, dict[str, Any]], config: TrainConfig, device: str) -> dict[str, Any]:
    """What was run, where, how long each stage took here, and which were taken from another run's work."""
    return {
        "name": config.name,
        "seed": config.seed,
        "base": config.model.path,
        "method": config.prune.name,
        "steps": config.trainer.max_steps,
        "device": device,
        "train_peak_is": results["fit"]["train_peak_kind"],
        "seconds": {name: result["seconds"] for name, result in results.items() if "shared_from" not in result},
        "shared": {name: result["shared_from"] for name, result in results.items() if "shared_from" in result},
    }


def _seconds_by_part(results: Mapping[str, dict[str, Any]], before: Mapping[str, float]) -> dict[str, float]:
    """Where the time went: load, data and evaluation over all stages; what tuned beside the run by its name.

    Rests of a stage that belong to no part of its own go by the stage's name.
    """
    found: dict[str, float] = dict.fromkeys(
        ("load", "data", "importance", "choice", "reconstruction", "training", "dense_lora", "cut", "export"), 0.0
    )
    rests = {"fit": "training", "dense": "evaluation", "pruned": "evaluation"}
    for stage, seconds in [("", before), *((name, result.get("parts", {})) for name, result in results.items())]:
        if "shared_from" in results.get(stage, {}):
            continue
        for part, value in seconds.items():
            beside = stage in ("dense_lora", *BASELINES) and part not in ("load", "data", "evaluation")
            name = stage if beside else rests.get(part, part)
            found[name] = found.get(name, 0.0) + value
    return {name: round(value, 2) for name, value in found.items() if value}


def _quality(results: Mapping[str, dict[str, Any]], values: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """Figures of every model on the target domain, and what of the dense model's the pruned one and baselines keep."""
    found: dict[str, Any] = {
        "eval": values,
        "eval_counts": results["pruned"]["counts"],
        "recovery_vs_dense": recovery(values["pruned"], values["dense"]),
    }
    if "dense_lora" in values:
        found["recovery"] = recovery(values["pruned"], values["dense_lora"])
    reference = values.get("dense_lora", values["dense"])
    baselines = {name: results[name] for name in BASELINES if name in results}
    if baselines:
        found["baselines"] = {
            name: {"sparsity": result["sparsity"], "recovery": recovery(result["values"], reference)}
            for name, result in baselines.items()
        }
    return found


def _certainty(results: Mapping[str, dict[str, Any]], config: TrainConfig) -> dict[str, Any]:
    """Intervals of every model, and the pruned model (and baselines) against dense and dense + LoRA, item by item."""
    models = [name for name in MODELS if name in results]
    resamples = config.evaluate.bootstrap
    compared: dict[str, Any] = {}
    for against in ("dense", "dense_lora"):
        for of in (name for name in models if name not in ("dense", against) and against in results):
            pairs = {
                name: paired(
                    Items.from_plain(items), Items.from_plain(results[against]["items"][name]), resamples=resamples
                )
                for name, items in results[of].get("items", {}).items()
                if name in results[against].get("items", {})
            }
            compared[f"{of}_vs_{against}"] = {name: pair for name, pair in pairs.items() if pair is not None}
    found = {name: results[name].get("intervals", {}) for name in models}
    return {"intervals": found, "paired": {name: pairs for name, pairs in compared.items() if pairs}}


def _beyond_the_target(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What was scored besides the target domain, by model: perplexities, further tasks, the harness' figures."""
    found = {}
    for key in ("forgetting", "tasks", "harness"):
        by_model = {name: results[name][key] for name in MODELS if results.get(name, {}).get(key)}
        if by_model:
            found[key] = by_model
    counts = results["pruned"].get("task_counts")
    return found | ({"task_counts": counts} if counts else {})


def write_card(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write the model card of a finished run into the exported directory."""
    run, base, prompt = metrics["run"], metrics["run"]["base"], metrics.get("prompt") or {}
    facts = CardFacts(
        title=f"{Path(base).name} pruned to {1 - metrics['sparsity']['blocks']:.0%} of its decoder blocks",
        architecture=metrics["export"]["architecture"],
        stock=metrics["export"]["stock"],
        widths=[LayerWidths(**w) for w in metrics["widths"]],
        dense_widths=[LayerWidths(**w) for w in metrics["dense_widths"]],
        base_model=base,
        license_id=base_license(base),
        datasets=[run["data"]["name"]],
        method=f"Masks ({run['method']}) and LoRA adapters trained jointly for {run['steps']} steps.",
        target_sparsity=metrics["sparsity"]["target"],
        block_sparsity=metrics["sparsity"]["blocks"],
        model_sparsity=metrics["sparsity"]["model"],
        parameters=metrics["parameters"]["pruned"],
        dense_parameters=metrics["parameters"]["dense"],
        metrics={name: metrics["eval"][name] for name in ("dense", "dense_lora", "pruned") if name in metrics["eval"]},
        recovery=metrics.get("recovery"),
        prompt=_prompt_text(prompt),
        chat=bool(prompt.get("inference") and prompt.get("chat")),
        files=[str(path.relative_to(folder)) for path in sorted(folder.glob("*/*")) if path.is_file()],
        checks=metrics["export"].get("formats", ()),
    )
    write_text(folder / "README.md", model_card(facts))


def _prompt_text(prompt: Mapping[str, Any]) -> str | None:
    """What stood before or around prompts at inference, for the card; None for nothing."""
    if not prompt.get("inference") or not (prompt.get("system") or prompt.get("template") != "{{ prompt }}"):
        return None
    return "\n\n".join(part for part in (prompt.get("system"), prompt.get("template")) if part)


def final_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of ``metrics.json`` that loggers keep as a run's summary, as ``final/<dotted path>``."""
    wanted = ("sparsity", "parameters", "removal", "eval", "recovery", "macs", "memory", "files", "speed")
    found: dict[str, float] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(value, f"{path}.{key}")
        elif isinstance(node, (int, float)) and not isinstance(node, bool):
            found[f"final/{path}"] = float(node)

    for key in wanted:
        walk(metrics.get(key), key)
    return found


def metric(metrics: Mapping[str, Any], path: str) -> float:
    """A value of ``metrics.json`` by dotted path (metric names may hold slashes, not dots).

    Raises:
        ValueError: No such value; the message lists what there is.
    """
    node: Any = metrics
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            there = sorted(node) if isinstance(node, Mapping) else []
            raise UserError(
                f"optimized_metric={path}: there is no {part!r}; at that level there are {', '.join(there)}"
            )
        node = node[part]
    if not isinstance(node, (int, float)):
        raise UserError(f"optimized_metric={path} is not a number; below it there are {', '.join(sorted(node))}")
    return float(node)
