"""The stages of a run: what each does with the run's model, data and directory.

Sits between the builders and the pipeline, which decides which stages run and in what order. Each public method is one
stage and returns plain data for its result file; models pass from stage to stage through the run directory, so that any
stage can be the first of a resumed run. It knows nothing of Hydra or of how ``metrics.json`` is laid out.

Shape suffixes: U units.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor
from transformers import PreTrainedModel

from atp.atomic import write_json
from atp.config.schema import TrainConfig
from atp.data.encoding.turn import template_of
from atp.data.prompt import PROMPT_FILE
from atp.data.reading.bad_rows import FILE as SKIPPED_FILE
from atp.data.reading.bad_rows import write_bad_rows
from atp.errors import UserError
from atp.evaluate.measure import count_parameters, peak_memory
from atp.export.bundle import check_formats, verify_formats, windows_of, write_formats
from atp.export.formats import FORMATS
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.export.verify.verification import as_plain
from atp.masks.merging import merge_in_place
from atp.model.adapter import Adapter
from atp.model.families import is_stock
from atp.model.layers import block_parameters
from atp.prepare.starts import Start
from atp.run import parts
from atp.run.agreement import compare_exports, compare_stages
from atp.run.assessment import PROMPTS_COUNTED, Assessor
from atp.run.directory import RunDirectory, RunInterrupted, saved_overrides
from atp.run.preparation import Preparation, read_cut, to_device, write_cut
from atp.run.stopwatch import Stopwatch
from atp.run.trained import cut_figures, cut_trained, cut_unmerged, load_trained, write_masks
from atp.train.aware import AwareModule
from atp.train.checkpoints import RunCheckpoint
from atp.train.joint import PruningModule
from atp.train.loggers import close_loggers, csv_logger, log_figures, log_folder, log_table, merge_csv, write_csv
from atp.train.login import open_logger
from atp.train.monitoring import MaskMonitor, TrainingHealth
from atp.train.progress import ProgressReport, QuietCollector, Throughput
from atp.train.tuning import TuningModule

log = logging.getLogger(__name__)


class Stages:
    """The stages of one run, and what they share.

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
        self.device = parts.device_of(config)
        if config.prune.budget_of == "latency" and config.prune.latency_table is None:
            config.prune.latency_table = str(directory.path / "latency.json")
        if config.threads:
            torch.set_num_threads(config.threads)
        parts.check_quantization(config)
        parts.check_start(config.prune)
        log.info("run directory: %s", directory.path)
        self.watch = Stopwatch()
        self.export_dtype = parts.export_dtype(config)
        with self.watch.part("load"):
            self.tokenizer = parts.load_tokenizer(config.model)
        self.prompt = parts.load_prompt(config, self.tokenizer)
        with self.watch.part("data"):
            plain = parts.load_splits(config.data, config.seed, self.tokenizer)
        if plain.skipped:
            write_bad_rows(directory.path / SKIPPED_FILE, plain.skipped)
        self.prompt_cost = self.prompt.cost(plain.test[:PROMPTS_COUNTED], self.tokenizer, config.data.max_length)
        self.splits = self.prompt.on_splits(plain, self.tokenizer)
        write_json(directory.path / PROMPT_FILE, self.prompt.plain())
        self.assessor = Assessor(config, self.tokenizer, self.prompt, self.splits.test, self.prompt_cost)
        dense = self.dense()
        parts.check_tokenizer(config.model, self.tokenizer, dense, self.splits.train)
        self.base_config, self.generation_config = dense.config, dense.generation_config
        parts.check_packing(config, dense.config)
        self.data = parts.data_module(config, self.splits, self.tokenizer, dense.config.max_position_embeddings)
        self.preparation = Preparation(config, self.data, self.device, self.watch)
        self.space = parts.pruning_space(config.prune, dense)
        self.dense_parameters = count_parameters(dense)
        asked = ("push_to_hub", "public", "dtype", "max_shard_size", *self._formats())
        wanted: dict[str, Any] = {name: getattr(config.export, name) for name in asked}
        uniform = config.prune.shape == "uniform"
        check_formats(dense.config, self.tokenizer, uniform=uniform, axes=config.prune.space, **wanted)
        self._loggers: list[Logger] | None = None

    @property
    def loggers(self) -> list[Logger]:
        """The chosen loggers, opened at first use; :meth:`close` finishes them."""
        if self._loggers is None:
            self._loggers = parts.make_loggers(self.config, self.directory.path)
            for logger in self._loggers:
                open_logger(logger, self.plain_config)
        return self._loggers

    def close(self) -> None:
        """Finish the loggers, whatever happened."""
        opened, self._loggers = self._loggers or [], None
        close_loggers(opened)

    def publish(self, figures: Mapping[str, float], table: tuple[list[str], list[list[str]]]) -> None:
        """Hand samples, final figures, the comparison and, on request, the exported model to the loggers."""
        columns, rows = table
        write_csv(self.directory.path / "comparison.csv", columns, rows)
        if not self.loggers:
            return
        if (samples_file := self.directory.path / "samples.json").is_file():
            fields = ["prompt", "reference", "dense", "pruned"]
            written = json.loads(samples_file.read_text(encoding="utf-8"))
            log_table(self.loggers, "samples", fields, [[row[field] for field in fields] for row in written])
        log_table(self.loggers, "comparison", columns, rows)
        log_figures(self.loggers, figures)
        if self.config.export.artifact:
            folder = self.directory.path / "pruned"
            if not log_folder(self.loggers, f"{self.config.name}-pruned", folder):
                log.warning("export.artifact=true has no effect: none of the chosen loggers keeps artifacts")

    def fit_jointly(self) -> dict[str, Any]:
        """Train masks and adapters together; leaves ``checkpoints/joint.ckpt``."""
        _ = self.loggers  # opened first: a refusal then costs nothing
        with self.watch.part("load"):
            base = parts.load_base(self.config.model, quantized=True, device=self.device)
        module = parts.pruning_module(self.config, base)
        parts.tell_settings(self.config, module, saved_overrides(self.directory.path))
        repairs = self.config.prune.repair.batches > 0
        if repairs:
            module.calibration, module.part = self.preparation.calibration, self.watch.part
        before = self.directory.path / "preparation.json"
        if not self.directory.checkpoint("joint").is_file():
            with peak_memory(self.device) as peak:
                start = self._warm_start(module)
                if repairs and self.config.prune.repair.at == "start":
                    self.preparation.repair_start(module, start)
                del start  # with moments that no step needs
            write_json(before, {"peak_mib": peak.mib})
        if isinstance(module, AwareModule):
            module.calibration_batch = self.data.calibration_batch
        with peak_memory(self.device) as peak:
            self._fit("joint", module)
        prepared = json.loads(before.read_text(encoding="utf-8"))["peak_mib"] if before.is_file() else 0.0
        return {"train_peak_mib": max(prepared, peak.mib), "steps_peak_mib": peak.mib, "train_peak_kind": peak.kind}

    def _warm_start(self, module: PruningModule) -> Start | None:
        """Let the generator begin with the importance of the dense model's units."""
        start = self.preparation.warm_start(module, self.config.prune.warm_start)
        if start and start.losses:
            plain = {"chosen": start.name, "repaired_loss": start.losses, "batches": start.batches}
            write_json(self.directory.path / "start.json", {"format": 1, **plain})
        return start

    def remove_and_export(self) -> dict[str, Any]:
        """Cut the pruned units for good, write ``pruned/``, and compare masked, removed and reloaded model."""
        module, masks_U = self._trained()
        write_masks(self.directory.path / "masks.json", self.space, masks_U, module.final_scores_U.cpu())
        log.info("removal: cutting %d of %d units", int((masks_U < 0.5).sum()), self.space.num_units)
        masked = module.masked.to(self.device).eval()
        with self.watch.part("cut"):
            merge = self.config.export.merge
            removed, stored, adapter = cut_trained(module, self.base_config, self.device, merge=merge)
        batches = self._check_batches()
        path = self.directory.path / "pruned"
        with self.watch.part("export"):
            self._export(stored, adapter, path, overwrite=True)
            write_formats(path, **self._formats())
        merged, dtype = adapter is None, self.export_dtype
        return {
            **compare_stages(masked, removed, self.pruned(), batches, stored=dtype, rounded=merged),
            "tokens": int(sum(batch["attention_mask"].sum() for batch in batches)),
            "stock": is_stock(removed.config),
            "adapter": adapter is not None,
            "formats": self._verify_formats(path, removed),
            "architecture": type(removed).__name__,
            **cut_figures(module, masks_U),
            "parameters": count_parameters(removed),
        }

    def export_unmerged(self, path: Path, *, overwrite: bool = False) -> tuple[float, str]:
        """Write the finished run's model once more, as pruned base with the adapter beside it.

        Returns:
            Largest logit difference from the run's own export, and what is wrong if it is too large.

        Raises:
            ValueError: The run trained no mask and adapter to a checkpoint, or folded gates into merged weights.
        """
        if not self.directory.checkpoint("joint").is_file():
            raise UserError(f"{self.directory.path} holds no checkpoints/joint.ckpt, which has the adapter")
        module, _ = self._trained()
        if module.gates is not None:
            raise UserError("this run folded soft gates into the merged weights, so no adapter can be taken apart")
        stored, adapter = cut_unmerged(module, self.base_config, self.device)
        self._export(stored, adapter, path, overwrite=overwrite)
        working = parts.DTYPES[self.config.model.dtype]
        written = load_exported(path, dtype=working, device=self.device)
        return compare_exports(self.pruned(), written, self._check_batches(), stored=self.export_dtype)

    def _trained(self) -> tuple[PruningModule, Tensor]:
        """The module as training left it, and its final masks."""
        module = parts.pruning_module(self.config, self.dense())
        load_trained(module, self.directory.checkpoint("joint"))
        return module, module.final_masks_U.cpu()

    def _export(self, stored: PreTrainedModel, adapter: Adapter | None, path: Path, *, overwrite: bool) -> None:
        """Write a Hugging Face directory with what every export of this run carries."""
        log.info("export: %s", path)
        stored.generation_config = parts.export_generation(
            self.generation_config, self.prompt, self.splits, self.tokenizer
        )
        export_hf(
            stored,
            self.tokenizer,
            path,
            provenance=self.origin,
            overwrite=overwrite,
            dtype=self.export_dtype,
            max_shard_size=self.config.export.max_shard_size,
            adapter=adapter,
        )
        if not self.prompt.is_empty or template_of(self.tokenizer):  # also to say that no template was used
            write_json(path / PROMPT_FILE, self.prompt.plain())

    def _formats(self) -> dict[str, Any]:
        """The further formats that this run asks for, each with its setting ``export.<format>``."""
        return {name: value for name in FORMATS if (value := getattr(self.config.export, name, None))}

    def _verify_formats(self, path: Path, removed: PreTrainedModel) -> list[dict[str, Any]]:
        """Each exported format compared with the removed model in a fresh process."""
        settings = self.config.export
        if not settings.verify:
            return []
        batches = list(itertools.islice(self.data.val_dataloader(), 64))
        windows = windows_of(batches, settings.verify_tokens, self.config.data.max_length)
        exact = removed.dtype == self.export_dtype == torch.float32
        return as_plain(verify_formats(path, windows, removed if exact else None, self.config.threads))

    def tune(self, name: str, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> dict[str, Any]:
        """LoRA-tune a model on the run's data and steps, then evaluate it."""
        blocks = block_parameters(model)
        module = parts.tuning_module(self.config, model, teacher)
        self._fit(name, module)
        tuned = merge_in_place(module.model)
        return {**self.evaluate_model(tuned), "sparsity": 1.0 - blocks / self.space.total_parameters}

    def tune_baseline(self, name: str) -> dict[str, Any]:
        """Prune at once by the named rule, then tune and evaluate."""
        teacher = self.assessor.place(self.dense()) if parts.is_distilled(self.config) else None
        kept = self.directory.checkpoint(f"{name}_cut")
        result = self.tune(name, self._cut_at_once(name, kept), teacher)
        kept.unlink(missing_ok=True)
        return result

    def _cut_at_once(self, name: str, kept: Path) -> PreTrainedModel:
        """The dense model pruned before any training, repaired as the run's own is; in ``kept`` until it is tuned."""
        config = parts.two_stage(self.config, name)
        module = parts.pruning_module(config, self.dense())
        if kept.is_file():
            return read_cut(kept, module, self.base_config)
        start = self.preparation.warm_start(module, config.prune.warm_start)
        cut = self.preparation.cut(module, self.base_config, start)
        write_cut(kept, cut, module)
        return cut

    def evaluate_model(self, model: PreTrainedModel) -> dict[str, Any]:
        """Quality on the test records, on further tasks, and on what is not the target domain."""
        with self.watch.part("evaluation"):
            return self.assessor.quality(model)

    def write_samples(self) -> dict[str, Any]:
        """Continue a few test prompts with dense and pruned model; leaves ``samples.json``."""
        if self.config.evaluate.samples < 1:
            return {}
        rows = self.assessor.continuations(self.dense(), self.pruned())
        write_json(self.directory.path / "samples.json", rows)
        return {"count": len(rows)}

    def measure(self) -> dict[str, Any]:
        """Size, compute, memory and, unless switched off, speed of dense and pruned model."""
        return self.assessor.cost(self.dense(), self.pruned(), self.directory.path / "pruned")

    # ---- what stages share

    def dense(self) -> PreTrainedModel:
        """The base model, loaded afresh."""
        with self.watch.part("load"):
            return parts.load_base(self.config.model)

    def pruned(self) -> PreTrainedModel:
        """The exported model, loaded back from the run directory; in the base's working type unless told otherwise."""
        dtype = None if self.config.export.dtype else parts.DTYPES[self.config.model.dtype]
        with self.watch.part("load"):
            return load_exported(self.directory.path / "pruned", dtype=dtype, device=self.device)

    def _fit(self, name: str, module: TuningModule) -> None:
        """Train to the end, from the checkpoint if there is one."""
        config, checkpoint_path = self.config, self.directory.checkpoint(name)
        checkpoint = RunCheckpoint(checkpoint_path, config.trainer.checkpoint_every_n_steps)
        callbacks: list[Callback] = [QuietCollector(), Throughput(), TrainingHealth(), ProgressReport(name), checkpoint]
        logs = self.directory.path / "metrics" / name
        loggers: list[Logger] = [csv_logger(logs)]
        if isinstance(module, PruningModule):
            callbacks.insert(0, MaskMonitor(self.directory.path, logs / "mask_history.jsonl"))
            loggers += self.loggers
        trainer = parts.make_trainer(config, callbacks, loggers, self.data.num_batches, self.directory.path)
        resume = checkpoint_path if checkpoint_path.is_file() else None
        with self.watch.part("training"):
            trainer.fit(module, datamodule=self.data, ckpt_path=resume, weights_only=True)
        merge_csv(logs, self.directory.path / "metrics" / ("train.csv" if name == "joint" else f"{name}.csv"))
        if checkpoint.interrupted:
            raise RunInterrupted(
                f"stopped after step {trainer.global_step} of {name}; go on with: resume={self.directory.path}"
            )

    def _check_batches(self) -> list[dict[str, Tensor]]:
        """A few real batches on which masked, removed and reloaded model are compared."""
        self.data.setup("fit")
        return list(to_device(itertools.islice(self.data.val_dataloader(), 4), self.device))
