"""How good, how large and how fast a run's models are.

Sits between the stages, which decide when a model is assessed and keep the figures, and the measurements of
:mod:`atp.evaluate`. It knows the run's settings, records and prompt, and nothing of how a model came to be or where
results are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atp.config.schema import TrainConfig
from atp.data.prompt import Prompt
from atp.data.records import Record, as_completion
from atp.evaluate import harness
from atp.evaluate.measure import compare_speed, file_mib, macs_per_token, weights_mib
from atp.evaluate.metrics import Metrics
from atp.evaluate.quality import evaluate, samples
from atp.run import parts

PROMPTS_COUNTED = 200
"""Test records over which the cost of a prompt is counted."""


class Assessor:
    """Scores and measures models by a run's settings.

    Args:
        config: The typed configuration.
        tokenizer: Of the base model.
        prompt: The run's prompt.
        test: Test records, with the prompt where it is asked for.
        prompt_cost: What the prompt adds to test records.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        test: Sequence[Record],
        prompt_cost: Mapping[str, float],
    ) -> None:
        self.config, self.tokenizer, self.prompt, self.prompt_cost = config, tokenizer, prompt, prompt_cost
        self.test = test
        self.others, self.further = parts.load_beyond(config)
        self.device = parts.device_of(config)

    def place(self, model: PreTrainedModel) -> PreTrainedModel:
        """Move a model to the device of evaluation, in eval mode."""
        torch.nn.Module.to(model, self.device)
        return model.eval()

    def quality(self, model: PreTrainedModel) -> dict[str, Any]:
        """Quality on the test records, on further tasks, and on what is not the target domain."""
        settings = self.config.evaluate
        metrics = self._score(model, self.test, settings.max_generate)
        result: dict[str, Any] = {
            "values": metrics.values,
            "counts": metrics.counts,
            "intervals": metrics.intervals(settings.bootstrap),
            "items": {name: items.plain() for name, items in metrics.items.items()},
        }
        result["forgetting"] = {name: self._perplexity(model, records) for name, records in self.others.items()}
        if settings.tasks and settings.harness:
            result["harness"] = harness.score(
                model, self.tokenizer, settings.tasks, folder=settings.harness_path, batch_size=settings.batch_size
            )
        elif settings.tasks:
            scored = {name: self._further(model, records) for name, records in self.further.items()}
            result["tasks"] = {name: values for name, (values, _) in scored.items()}
            result["task_counts"] = {name: counts for name, (_, counts) in scored.items()}
        return result

    def _score(self, model: PreTrainedModel, records: Sequence[Record], max_generate: int | None) -> Metrics:
        settings = self.config.evaluate
        return evaluate(
            self.place(model),
            self.tokenizer,
            records,
            max_length=self.config.data.max_length,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            max_generate=max_generate,
            normalise=parts.normalisation(self.config),
            stride=settings.stride,
            device=self.device,
        )

    def _further(self, model: PreTrainedModel, plain: Sequence[Record]) -> tuple[dict[str, float], dict[str, int]]:
        """Metrics of one further task, without the task's name in them, and what they are over."""
        records = [self.prompt.on(record, self.tokenizer) if self.prompt.inference else record for record in plain]
        metrics = self._score(model, records, self.config.evaluate.max_generate)
        values = {key.rsplit("/", 1)[-1]: value for key, value in metrics.values.items()}
        return values, {key.rsplit("/", 1)[-1]: count for key, count in metrics.counts.items()}

    def _perplexity(self, model: PreTrainedModel, records: Sequence[Record]) -> dict[str, float]:
        """Perplexity on records of another domain, without a prompt; of choices, on the right one."""
        metrics = self._score(model, [as_completion(record) for record in records], 0)
        return {name: metrics.values[name] for name in ("perplexity", "bits_per_byte")}

    def continuations(self, dense: PreTrainedModel, pruned: PreTrainedModel) -> list[dict[str, str]]:
        """Continue a few test prompts with both models; return both texts beside the reference."""
        settings = self.config.evaluate
        written = [
            samples(
                model,
                self.tokenizer,
                self.test,
                count=settings.samples,
                max_new_tokens=settings.max_new_tokens,
                max_length=self.config.data.max_length,
                device=self.device,
            )
            for model in (self.place(dense), self.place(pruned))
        ]
        return [
            {
                "prompt": by_dense.prompt,
                "reference": by_dense.reference,
                "dense": by_dense.generated,
                "pruned": by_pruned.generated,
            }
            for by_dense, by_pruned in zip(*written, strict=True)
        ]

    def cost(self, dense: PreTrainedModel, pruned: PreTrainedModel, folder: Path) -> dict[str, Any]:
        """Size, compute, memory and, unless switched off, speed of both models; ``folder`` holds the pruned one."""
        settings = self.config.evaluate
        dense, pruned = self.place(dense), self.place(pruned)
        result: dict[str, Any] = {
            "macs": {
                "dense_per_token": macs_per_token(dense, self.config.data.max_length),
                "pruned_per_token": macs_per_token(pruned, self.config.data.max_length),
                "context": self.config.data.max_length,
            },
            "memory": {"dense_weights_mib": weights_mib(dense), "pruned_weights_mib": weights_mib(pruned)},
            "files": {"pruned_mib": file_mib(folder)},
        }
        source = Path(parts.model_source(self.config.model))
        if source.is_dir():
            result["files"]["dense_mib"] = file_mib(source)
        shared = int(self.prompt_cost["shared_prefix_tokens"])
        result["prompt"] = {**self.prompt_cost}
        if settings.speed and shared:
            timed = compare_speed(dense, pruned, prompt_tokens=shared, new_tokens=1, repeats=settings.speed_repeats)
            for name in ("dense", "pruned"):
                result["prompt"][f"{name}_prefix_latency_ms"] = timed[name]["prefill_latency_ms"]
        if settings.speed:
            result["speed"] = compare_speed(
                dense,
                pruned,
                prompt_tokens=settings.speed_prompt_tokens,
                new_tokens=settings.speed_new_tokens,
                repeats=settings.speed_repeats,
            )
        return result
