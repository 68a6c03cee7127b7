"""One run, from configuration to report.

fit -> remove and export -> evaluate -> reference and baselines -> samples -> measure -> report.

The top of the flow. Every stage leaves its result in the run directory before the next begins, so an interrupted run
goes on where it stopped. It knows the order of stages and what each hands to the next; how anything is done is known
below.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from atp import build
from atp.architecture import is_stock, layer_widths
from atp.callbacks import MaskHistory, ProgressReport, RunCheckpoint, Throughput
from atp.config import TrainConfig
from atp.evaluate.measure import compare_speed, count_parameters, file_mib, macs_per_token, peak_memory, weights_mib
from atp.evaluate.quality import evaluate, samples
from atp.export.card import load_lines
from atp.export.huggingface import export_hf
from atp.export.loading import load_exported
from atp.generator import MagnitudeScores, RandomScores
from atp.importance import fisher_importance, standardise
from atp.loggers import close_loggers, csv_logger, merge_csv
from atp.lora import merge_in_place, merged_tensors
from atp.module import PruningModule, TuningModule
from atp.removal import max_logit_difference, remove, widths_after
from atp.report.comparison import comparison_table
from atp.report.page import write_report
from atp.results import assemble, metric, write_card
from atp.rundir import RunDirectory, provenance, write_json
from atp.selection import select
from atp.space import KINDS, PruningSpace

log = logging.getLogger(__name__)

BASELINES = ("random", "uniform")


class RunInterrupted(Exception):
    """Ctrl-C or SIGTERM ended training; the message says how to go on."""


def run(cfg: DictConfig, run_dir: Path, *, overrides: list[str]) -> float | None:
    """Execute a run, or the rest of one.

    Args:
        cfg: The composed configuration.
        run_dir: The run directory.
        overrides: The command line's overrides, kept for resuming.

    Returns:
        The metric named by ``optimized_metric``.

    Raises:
        ValueError: A user's mistake.
        RunInterrupted: A signal ended training early.
    """
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    unknown = set(config.evaluate.baselines) - set(BASELINES)
    if unknown:
        raise ValueError(f"evaluate.baselines holds {sorted(unknown)}; known: {', '.join(BASELINES)}")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain.pop("run_dir")  # named after the moment of composing, so it differs when the run goes on
    directory = RunDirectory(run_dir, plain, overrides, resume=config.resume is not None)
    console = Console()
    _quiet_libraries()
    if directory.is_finished:
        log.info("%s is finished; nothing to do", run_dir)
    else:
        Run(config, directory, plain, provenance(overrides)).execute()
    metrics = directory.read_metrics()
    console.print(comparison_table(metrics))
    console.print(
        f"run directory: {run_dir}", f"report:        {run_dir / 'report.html'}", "", sep="\n", highlight=False
    )
    console.print(load_lines(str(run_dir / "pruned"), stock=metrics["export"]["stock"]), highlight=False, markup=False)
    return metric(metrics, config.optimized_metric)


class Run:
    """The stages of one run and what they share.

    Args:
        config: The typed configuration.
        directory: Where everything is written.
        plain_config: The same configuration as plain data, for loggers.
        origin: Provenance: command, git, versions.
    """

    def __init__(
        self, config: TrainConfig, directory: RunDirectory, plain_config: dict[str, Any], origin: dict[str, Any]
    ) -> None:
        self.config, self.directory, self.plain_config, self.origin = config, directory, plain_config, origin
        self.device = build.device_of(config)
        if config.threads:
            torch.set_num_threads(config.threads)
        log.info("run directory: %s", directory.path)
        self.tokenizer = build.load_tokenizer(config.model)
        self.splits = build.load_splits(config.data, config.seed)
        dense = self._dense()
        self.base_config, self.generation_config = dense.config, dense.generation_config
        self.data = build.data_module(config, self.splits, self.tokenizer, dense.config.max_position_embeddings)
        self.space = build.pruning_space(config.prune, dense)
        self.dense_parameters = count_parameters(dense)

    def execute(self) -> None:
        """All stages in order, then metrics and report."""
        stages: dict[str, Callable[[], dict[str, Any]]] = {
            "fit": self._fit_jointly,
            "export": self._remove_and_export,
            "dense": lambda: self._evaluate(self._dense()),
            "pruned": lambda: self._evaluate(self._pruned()),
        }
        if self.config.evaluate.reference:
            stages["dense_lora"] = lambda: self._tune("dense_lora", self._dense())
        for name in self.config.evaluate.baselines:
            stages[name] = functools.partial(self._tune_baseline, name)
        stages |= {"samples": self._samples, "cost": self._measure}
        results = {name: self._stage(name, work) for name, work in stages.items()}
        metrics = assemble(
            results,
            config=self.config,
            origin=self.origin,
            data={"name": self.splits.name, **self.splits.counts()},
            dense_parameters=self.dense_parameters,
            dense_blocks=self.space.total_parameters,
            dense_widths=[asdict(widths) for widths in layer_widths(self.base_config)],
            device=str(self.device),
        )
        write_card(self.directory.path / "pruned", metrics)
        self.directory.write_metrics(metrics)
        write_report(self.directory.path)

    def _stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A stage's result, with the seconds it took; done once however often the run is resumed."""

        def timed() -> dict[str, Any]:
            log.info("stage: %s", name)
            seed_everything(self.config.seed, workers=True, verbose=False)
            started = time.perf_counter()
            result = work()
            gc.collect()
            return {**result, "seconds": round(time.perf_counter() - started, 2)}

        return self.directory.stage(name, timed)

    # ---- stages

    def _fit_jointly(self) -> dict[str, Any]:
        module = build.pruning_module(self.config, self._dense())
        if not self.directory.checkpoint("joint").is_file():
            self._warm_start(module)
        with peak_memory(self.device) as peak:
            self._fit("joint", module)
        return {"train_peak_mib": peak.mib, "train_peak_kind": peak.kind}

    def _warm_start(self, module: PruningModule) -> None:
        """Let the generator begin with the importance of the dense model's units."""
        settings = self.config.prune.warm_start
        if settings.batches < 1:
            return
        self.data.setup("fit")
        batches = itertools.islice(self.data.train_dataloader(), settings.batches)
        importance_U = fisher_importance(module.masked.to(self.device), to_device(batches, self.device))
        module.generator.warm_start(settings.gain * standardise(self.space, importance_U.cpu()))

    def _remove_and_export(self) -> dict[str, Any]:
        module = build.pruning_module(self.config, self._dense())
        self._load("joint", module)
        if not module.is_frozen:
            module.freeze_masks()
        masks_U = module.final_masks_U.cpu()
        self._write_masks(masks_U, module.final_scores_U.cpu())
        log.info("removal: cutting %d of %d units", int((masks_U < 0.5).sum()), self.space.num_units)
        masked = module.masked.to(self.device).eval()
        masked.set_masks(masks_U.to(self.device))
        removed = remove(merged_tensors(masked.peft_model), self.base_config, self.space, masks_U, device=self.device)
        removed.generation_config = copy.deepcopy(self.generation_config)
        batches = self._check_batches()
        masked_vs_removed = max_logit_difference(masked, removed, batches)
        path = self.directory.path / "pruned"
        log.info("export: %s", path)
        export_hf(
            removed,
            self.tokenizer,
            path,
            provenance=self.origin,
            overwrite=True,
            dtype=build.DTYPES[self.config.export.dtype] if self.config.export.dtype else None,
            max_shard_size=self.config.export.max_shard_size,
        )
        removed_vs_reloaded = max_logit_difference(removed, self._pruned(), batches)
        return {
            "max_abs_logit_diff": max(masked_vs_removed, removed_vs_reloaded),
            "masked_vs_removed": masked_vs_removed,
            "removed_vs_reloaded": removed_vs_reloaded,
            "dtype": str(next(removed.parameters()).dtype).removeprefix("torch."),
            "tokens": int(sum(batch["attention_mask"].sum() for batch in batches)),
            "stock": is_stock(removed.config),
            "architecture": type(removed).__name__,
            "widths": [asdict(widths) for widths in widths_after(self.space, masks_U)],
            "sparsity": float(self.space.sparsity(masks_U.double())),
            "pruned_blocks": int(self.space.remaining_parameters(masks_U.double())),
            "parameters": count_parameters(removed),
        }

    def _tune(self, name: str, model: PreTrainedModel) -> dict[str, Any]:
        """LoRA-tune a model on the run's data and steps, then evaluate it."""
        blocks = PruningSpace.from_model(model, KINDS).total_parameters
        module = build.tuning_module(self.config, model)
        self._fit(name, module)
        tuned = merge_in_place(module.model)
        return {**self._evaluate(tuned), "sparsity": 1.0 - blocks / self.space.total_parameters}

    def _tune_baseline(self, name: str) -> dict[str, Any]:
        return self._tune(name, self._cut_at_once(name))

    def _cut_at_once(self, name: str) -> PreTrainedModel:
        """The dense model pruned to the same budget before any training."""
        dense = self._dense()
        sparsity, least = self.config.prune.sparsity, build.min_units(self.config.prune)
        if name == "random":
            masks_U = select(self.space, RandomScores(self.space, self.config.seed)(), sparsity, min_units=least)
        else:
            scores_U = MagnitudeScores(self.space, dense.state_dict())()
            masks_U = select(self.space, scores_U, sparsity, shape="uniform", min_units=least)
        return remove(dense.state_dict().items(), self.base_config, self.space, masks_U)

    def _evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        settings = self.config.evaluate
        metrics = evaluate(
            self._placed(model),
            self.tokenizer,
            self.splits.test,
            max_length=self.config.data.max_length,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            max_generate=settings.max_generate,
            device=self.device,
        )
        return {"values": metrics.values, "counts": metrics.counts}

    def _samples(self) -> dict[str, Any]:
        settings = self.config.evaluate
        if settings.samples < 1:
            return {}
        written = [
            samples(
                model,
                self.tokenizer,
                self.splits.test,
                count=settings.samples,
                max_new_tokens=settings.max_new_tokens,
                max_length=self.config.data.max_length,
                device=self.device,
            )
            for model in (self._placed(self._dense()), self._pruned())
        ]
        rows = [
            {
                "prompt": by_dense.prompt,
                "reference": by_dense.reference,
                "dense": by_dense.generated,
                "pruned": by_pruned.generated,
            }
            for by_dense, by_pruned in zip(*written, strict=True)
        ]
        write_json(self.directory.path / "samples.json", rows)
        return {"count": len(rows)}

    def _measure(self) -> dict[str, Any]:
        settings = self.config.evaluate
        dense, pruned = self._placed(self._dense()), self._pruned()
        result: dict[str, Any] = {
            "macs": {
                "dense_per_token": macs_per_token(dense, self.config.data.max_length),
                "pruned_per_token": macs_per_token(pruned, self.config.data.max_length),
                "context": self.config.data.max_length,
            },
            "memory": {"dense_weights_mib": weights_mib(dense), "pruned_weights_mib": weights_mib(pruned)},
            "files": {"pruned_mib": file_mib(self.directory.path / "pruned")},
        }
        source = Path(build.model_source(self.config.model))
        if source.is_dir():
            result["files"]["dense_mib"] = file_mib(source)
        if settings.speed:
            result["speed"] = compare_speed(
                dense,
                pruned,
                prompt_tokens=settings.speed_prompt_tokens,
                new_tokens=settings.speed_new_tokens,
                repeats=settings.speed_repeats,
            )
        return result

    # ---- what stages share

    def _dense(self) -> PreTrainedModel:
        return build.load_base(self.config.model)

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        torch.nn.Module.to(model, self.device)
        return model.eval()

    def _pruned(self) -> PreTrainedModel:
        return load_exported(self.directory.path / "pruned", device=self.device)

    def _fit(self, name: str, module: TuningModule) -> None:
        """Train to the end, from the checkpoint if there is one."""
        config, checkpoint_path = self.config, self.directory.checkpoint(name)
        checkpoint = RunCheckpoint(checkpoint_path, config.trainer.checkpoint_every_n_steps)
        callbacks: list[Callback] = [Throughput(), ProgressReport(name), checkpoint]
        logs = self.directory.path / "metrics" / name
        loggers: list[Logger] = [csv_logger(logs)]
        try:
            if isinstance(module, PruningModule):
                callbacks.append(MaskHistory(logs / "masks.csv", config.trainer.log_every_n_steps))
                chosen = build.make_loggers(config, self.directory.path)
                loggers += chosen
                for logger in chosen:
                    logger.log_hyperparams(self.plain_config)
            trainer = build.make_trainer(config, callbacks, loggers, self.data.num_batches)
            resume = checkpoint_path if checkpoint_path.is_file() else None
            trainer.fit(module, datamodule=self.data, ckpt_path=resume, weights_only=True)
        finally:
            close_loggers(loggers)
        merge_csv(logs, self.directory.path / "metrics" / ("train.csv" if name == "joint" else f"{name}.csv"))
        if checkpoint.interrupted:
            raise RunInterrupted(
                f"stopped after step {trainer.global_step} of {name}; go on with: resume={self.directory.path}"
            )

    def _load(self, name: str, module: TuningModule) -> None:
        state = torch.load(self.directory.checkpoint(name), map_location="cpu", weights_only=True)
        module.on_load_checkpoint(state)
        module.load_state_dict(state["state_dict"], strict=False)

    def _write_masks(self, masks_U: Tensor, scores_U: Tensor) -> None:
        axes = {name: [int(x) for x in values] for name, values in self.space.split(masks_U).items()}
        scores = {name: [round(float(x), 6) for x in values] for name, values in self.space.split(scores_U).items()}
        write_json(self.directory.path / "masks.json", {"format": 1, "axes": axes, "scores": scores})

    def _check_batches(self) -> list[dict[str, Tensor]]:
        """A few real batches on which masked, removed and reloaded model are compared."""
        self.data.setup("fit")
        return list(to_device(itertools.islice(self.data.val_dataloader(), 4), self.device))


def to_device(batches: Iterable[Mapping[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The batches, moved one at a time."""
    for batch in batches:
        yield {key: value.to(device) for key, value in batch.items()}


def _quiet_libraries() -> None:
    """Keep libraries from talking over the run's own lines."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="transformers", category=FutureWarning)
