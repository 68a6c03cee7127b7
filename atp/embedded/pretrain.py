"""Make the embedded base anew: corpus, tokenizer, weights and the figures they reach.

What it is: `python -m atp.embedded.pretrain`, a plain PyTorch loop.
Where it sits: corpus, tokenizer, figures -> pretrain -> the files that `atp.embedded.base_dir` names.
What it does NOT know: pruning, LoRA, Hydra.

On a machine that others use too, set GOMP_SPINCOUNT=10000: with PyTorch's default its threads burn their time waiting
for one another.

All four domains are mixed equally. Every token of a record counts, and those after a prompt count more, because a short
answer would otherwise be lost among the tokens of its prompt. Batches hold records of like length, so that
padding stays small; no training record is seen twice. Shapes: B batch, T tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atp.atomic import appearing, write_json
from atp.embedded import corpus, figures, growth
from atp.embedded.drawing import Draw
from atp.embedded.tokenizer import train_tokenizer
from atp.errors import UserError

log = logging.getLogger(__name__)

CONTEXT = 512
_POOL = 256  # records of each domain that are sorted by length together
_WARMUP_STEPS = 100
_FINAL_SHARE = 0.03  # of the peak learning rate, at the end of the cosine
_CHECKPOINT_SECONDS = 60.0
_MEASURED = {"validation": 200, "test": 400}  # records of each domain behind the figures
_ANSWER_WEIGHT = 3.0  # of a token after a prompt, against 1 for any other
_ADAM_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Settings:
    """What decides the weights.

    Attributes:
        steps: optimiser steps of the whole schedule.
        minutes: bound on the training time; the schedule then ends early, with its learning rate at the end value.
        seed: of the initial weights and the order of batches; the corpus has none.
        learning_rate: the peak, reached after the warm-up.
        batch_tokens: tokens of one optimiser step, padding included; two batches of different length share them.
        threads: CPU threads of PyTorch; 0 leaves its own choice.
        larger: a sibling of twice the size, grown from the embedded base, instead of the base itself.
    """

    steps: int = 5400
    minutes: float | None = None
    seed: int = 0
    learning_rate: float = 2e-3
    batch_tokens: int = 2048
    threads: int = 0
    larger: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps={self.steps} leaves nothing to do; give 1 or more")
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"--minutes={self.minutes} leaves no time; give more than 0, or leave it out")
        if self.batch_tokens < 2 * CONTEXT:
            raise UserError(f"--batch-tokens={self.batch_tokens} does not hold two records; give {2 * CONTEXT} or more")

    def command(self) -> str:
        """Return the command that repeats the run."""
        given = [(name, value) for name, value in asdict(self).items() if value != getattr(Settings(), name)]
        words = (f"--{n.replace('_', '-')}" + ("" if v is True else f" {v}") for n, v in given)
        return " ".join(["python -m atp.embedded.pretrain", *words])


@dataclass
class Progressed:
    """Where a run stands; written to the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the embedded base's shape: grouped-query attention, tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the default training split of all domains."""
    records = (record for domain in corpus.DOMAINS for record in corpus.records(domain, "train"))
    texts = (r["text"] if "text" in r else r["prompt"] + figures.continuation(r) for r in records)
    return train_tokenizer(texts, max_length=CONTEXT)


def batches(tokenizer: PreTrainedTokenizerFast, batch_tokens: int, seed: int, skip: int = 0) -> Iterator[list[Any]]:
    """Yield lists of encoded records, without end and always in the same order.

    Args:
        tokenizer: the embedded tokenizer.
        batch_tokens: bound on one batch, padding included.
        seed: of the order of the batches within a pool.
        skip: batches to pass over, for a resumed run.
    """
    streams = [corpus.stream(domain, "train") for domain in corpus.DOMAINS]
    number = passed = 0
    while True:
        pool = [figures.encode(record, tokenizer) for stream in streams for record in islice(stream, _POOL)]
        sorted_batches = list(figures.bucketed(pool, batch_tokens))
        for batch in Draw(f"batches/{seed}/{number}").some(sorted_batches, len(sorted_batches)):
            passed += 1
            if passed > skip:
                yield [pool[i] for i in batch]
        number += 1


def share_of_peak(settings: Settings, done: Progressed) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, then cosine down to a small rest."""
    warmup = min(_WARMUP_STEPS, settings.steps // 10)
    if done.step < warmup:
        return (done.step + 1) / (warmup + 1)
    passed = (done.step - warmup) / max(1, settings.steps - warmup)
    if settings.minutes is not None:
        passed = max(passed, done.seconds / (60 * settings.minutes))
    return _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, passed)))


class Trainer:
    """The loop, its optimiser, and its checkpoint in safetensors.

    Args:
        settings: what decides the weights.
        checkpoint: file that the state is written to while training, and read from by `resume`.
    """

    def __init__(self, settings: Settings, checkpoint: Path) -> None:
        self.settings, self.checkpoint = settings, checkpoint
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.tokenizer = make_tokenizer()
        grown = growth.sibling(self.tokenizer) if settings.larger else None
        self.model = (grown or LlamaForCausalLM(base_config(self.tokenizer))).train()
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        self.done = Progressed()

    def fit(self) -> None:
        """Train until the schedule or the time ends."""
        settings, done = self.settings, self.done
        halves = batches(self.tokenizer, settings.batch_tokens // 2, settings.seed, skip=2 * done.step)
        started, saved = time.monotonic() - done.seconds, time.monotonic()
        columns = (
            TextColumn("pretrain"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("pretrain", total=settings.steps, completed=done.step, told="")
            while done.step < settings.steps:
                loss = self.step([next(halves), next(halves)])
                done.seconds = time.monotonic() - started
                told = f"loss {loss:.3f}  {done.tokens / done.seconds:,.0f} tokens/s"
                progress.update(bar, completed=done.step, told=told)
                if done.step % 100 == 0:
                    log.info("step %d  %s  %.0f s", done.step, told, done.seconds)
                if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self.save_checkpoint()
                    saved = time.monotonic()
                if settings.minutes is not None and done.seconds >= 60 * settings.minutes:
                    break

    def step(self, parts: Sequence[Sequence[figures.Encoded]]) -> float:
        """Take one optimiser step over the parts and return the mean loss per token, in nats."""
        rate = self.settings.learning_rate * share_of_peak(self.settings, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        items = [item for part in parts for item in part]
        tokens = sum(len(item.ids) - item.scored_from for item in items)
        weights = tokens + (_ANSWER_WEIGHT - 1) * sum(len(item.ids) - item.answer_from for item in items)
        total = 0.0
        for part in parts:
            ids_BT, mask_BT, labels_BT = figures.padded(part, self.tokenizer.pad_token_id)
            logits_BTV = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1]
            loss_BT = torch.nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=figures.IGNORED, reduction="none"
            ).view(len(part), -1)
            answers_B1 = torch.tensor([[item.answer_from] for item in part])
            weight_BT = torch.where(torch.arange(1, ids_BT.shape[1]) >= answers_B1, _ANSWER_WEIGHT, 1.0)
            ((loss_BT * weight_BT).sum() / weights).backward()
            total += float(loss_BT.detach().sum())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done.step += 1
        self.done.tokens += tokens
        return total / tokens

    def save_checkpoint(self) -> None:
        """Write weights, optimiser state and position, so that `resume` goes on from here."""
        tensors = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {f"{key}/{name}": state[key] for key in _ADAM_KEYS}
        note = {"settings": json.dumps(asdict(self.settings)), "done": json.dumps(asdict(self.done))}
        with appearing(self.checkpoint) as stage:
            save_file(tensors, stage, metadata=note)

    def resume(self) -> None:
        """Take weights, optimiser state and position from the checkpoint.

        Raises:
            ValueError: there is no checkpoint, or it was written with other settings.
        """
        if not self.checkpoint.is_file():
            raise UserError(f"--resume: there is no checkpoint {self.checkpoint}; leave the flag out to start anew")
        with safe_open(self.checkpoint, framework="pt") as stored:
            note = stored.metadata()
            if json.loads(note["settings"]) != asdict(self.settings):
                raise UserError(
                    f"--resume: {self.checkpoint} was written with {note['settings']}, not with "
                    f"{json.dumps(asdict(self.settings))}; repeat those settings or start anew"
                )
            self.done = Progressed(**json.loads(note["done"]))
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(stored.get_tensor(f"model/{name}"))
                    state = {key: stored.get_tensor(f"{key}/{name}") for key in _ADAM_KEYS}
                    self.optimizer.state[parameter] = {"step": torch.tensor(float(self.done.step)), **state}


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Return perplexity per domain on the validation split and accuracy per choice task on the test split."""
    found: dict[str, dict[str, float]] = {"perplexity": {}, "accuracy": {}}
    for domain in corpus.DOMAINS:
        held_out = corpus.records(domain, "validation", _MEASURED["validation"])
        tested = corpus.records(domain, "test", _MEASURED["test"])
        found["perplexity"][domain] = round(figures.perplexity(model, tokenizer, held_out), 4)
        for task, share in figures.accuracies(model, tokenizer, tested).items():
            found["accuracy"][f"{domain}/{task}"] = round(share, 4)
    return found


def save(trainer: Trainer, output: Path) -> dict[str, Any]:
    """Write the model in float32, tokenizer and `pretraining.json`, and return what the latter holds.

    Weights are rounded to bfloat16 precision first, so that the base is the same function in either type; the figures
    are those of the rounded weights.
    """
    model = trainer.model.to(torch.bfloat16).float()
    output.mkdir(parents=True, exist_ok=True)
    special = {name: getattr(trainer.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(output)
    trainer.tokenizer.save_pretrained(output)
    _name_tokenizer_class(output / "tokenizer_config.json")
    note = {
        "command": trainer.settings.command(),
        "settings": asdict(trainer.settings),
        "corpus_digest": corpus.digest(),
        "parameters": model.num_parameters(),
        **asdict(trainer.done),
        "tokens_per_second": round(trainer.done.tokens / trainer.done.seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "figures": measure(model, trainer.tokenizer),
        "measured_records": _MEASURED,
    }
    write_json(output / "pretraining.json", note)
    return note


def _name_tokenizer_class(path: Path) -> None:
    """Name the tokenizer's class as every version of transformers knows it; version 5 writes its own new name."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, train, save.

    Args:
        arguments: words of the command line; None for those of the process.
    """
    usual = Settings()
    parser = argparse.ArgumentParser(prog="python -m atp.embedded.pretrain", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/embedded_base"), help="directory of the new base")
    parser.add_argument("--steps", type=int, default=usual.steps, help="optimiser steps (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=None, help="end the schedule early after so many minutes")
    parser.add_argument("--seed", type=int, default=usual.seed, help="of weights and batch order (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=usual.learning_rate, help="peak (default %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=usual.batch_tokens, help="per step (default %(default)s)")
    parser.add_argument("--threads", type=int, default=usual.threads, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--larger", action="store_true", help="a sibling of twice the size, grown from the base")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside the output directory")
    given = vars(parser.parse_args(arguments))
    output, resume = given.pop("output"), given.pop("resume")
    try:
        settings = Settings(**given)
        output.parent.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(settings, output.with_name(output.name + ".resume.safetensors"))
        if resume:
            trainer.resume()
    except ValueError as error:
        parser.error(str(error))
    trainer.fit()
    note = save(trainer, output)
    trainer.checkpoint.unlink(missing_ok=True)
    log.info("saved %s: %s", output, json.dumps(note["figures"]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
