"""The configuration schema: every group and option, with its type, default and meaning.

The first thing in the flow. Hydra composes the YAML files of ``conf/`` onto these dataclasses, so that a misspelled key
or a wrong type fails before anything runs; ``--help`` prints the help texts. The code that uses a value checks its
range. Only :mod:`atp.run` and :mod:`atp.commands` import this file; the other rooms take plain keyword arguments.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import MISSING, asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from atp.config.option import option
from atp.config.prune import PruneConfig

SCHEMA_NAME = "schema"


def config_dir() -> str:
    """Absolute path of the YAML tree: inside the package when installed from a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent.parent / "conf"
    return str(packaged if packaged.is_dir() else Path(__file__).parent.parent.parent / "conf")


@dataclass
class ModelConfig:
    """The base model."""

    name: str = option("embedded", "short name for reports")
    path: str | None = option(
        "embedded", "'embedded', 'smollm2', a directory in Hugging Face layout, a GGUF file, or a hub id"
    )
    revision: str | None = option(None, "hub revision; unset takes the main branch")
    dtype: str = option("float32", "dtype of the frozen weights: float32, bfloat16 or float16")
    quantization: str | None = option(
        None, "nf4 or int8: train on a quantised base (pip install 'atp[quantization]'); the export is not quantised"
    )
    attn_implementation: str = option("sdpa", "attention kernel: sdpa, eager or flash_attention_2")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, about a third slower")


@dataclass
class DataConfig:
    """Training, validation and test data."""

    name: str = option("embedded_legal", "short name for reports")
    source: str = option("embedded", "embedded, files (your own), or tasks (from the hub or local files)")
    domain: str = option("legal", "embedded: legal, health, finance or narrative")
    path: Any = option(
        None, "files: file, pattern, folder or list of them; tasks: folder of local files, or task: file"
    )
    validation_path: Any = option(None, "files: validation file; unset takes the folder's own or carves a share off")
    test_path: Any = option(None, "files: test file; unset takes the folder's own or carves a share off")
    format: str | None = option(None, "files: jsonl, json, csv, tsv, parquet, arrow or text; unset goes by the suffix")
    shape: str = option(
        "auto", "files: what columns mean: auto, text, completion, choice, chat, question, instruction or chosen"
    )
    on_error: str = option("raise", "bad rows: raise at the first, or skip them and list them in skipped_rows.jsonl")
    fields: Any = option({}, "files: our field name -> column or Jinja template, e.g. {text: body}")
    tasks: Any = option({}, "tasks: name -> weight in the mix, null for all; embedded: tasks to keep")
    tasks_file: str | None = option(None, "TOML file that describes tasks of your own (see atp/data/tasks.toml)")
    shots: int | None = option(None, "few-shot: at most this many training records per task")
    near_duplicates: str = option("drop", "near duplicates of held-out records in training: drop, report or ignore")
    stream: bool = option(False, "files: read training records at every pass, for data larger than memory")
    packing: bool = option(False, "put several short training records into one sequence (attn_implementation=sdpa)")
    validation_fraction: float = option(0.05, "share carved off for validation where no file is given")
    test_fraction: float = option(0.05, "share carved off for the test where no file is given")
    max_train: int | None = option(None, "use at most this many training records")
    max_validation: int | None = option(200, "use at most this many validation records")
    max_test: int | None = option(400, "use at most this many test records")
    max_length: int = option(256, "tokens per training sequence; longer texts are cut into windows")
    batch_size: int = option(16, "sequences per forward pass")
    loss_on: str = option("auto", "auto (completions where there is a prompt), completion, or all")
    num_workers: int = option(0, "loader processes")
    cache: str | None = option(
        "auto", "folder that keeps token ids between runs; auto: $ATP_CACHE or ~/.cache/atp; null: none"
    )


@dataclass
class PromptConfig:
    """Text before and around each record's prompt."""

    name: str = option("none", "short name for reports")
    path: str | None = option(None, "prompt=file: a Jinja template with {{ prompt }}, or a text to stand before")
    system: str = option("", "Jinja template of what stands before; the system turn of a chat template")
    template: str = option("{{ prompt }}", "Jinja template of the rest")
    instructions: dict[str, str] = option({}, "task -> what {{ instruction }} stands for; 'default' for other tasks")
    train: bool = option(True, "use it in training and validation")
    inference: bool = option(True, "use it in evaluation and generation")
    chat: str = option("auto", "the base's chat template: auto (of an instruct model, or with a prompt), always, never")


@dataclass
class LoraConfig:
    """LoRA adapters (PEFT)."""

    r: int = option(8, "rank")
    alpha: float = option(16.0, "scale numerator: adapters are multiplied by alpha / r")
    dropout: float = option(0.0, "dropout before A")
    target_modules: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "linears to adapt"
    )


@dataclass
class OptimConfig:
    """AdamW; one group for adapters, one for the generator, one for Lagrange multipliers."""

    lr: float = option(1e-3, "peak learning rate of the adapters")
    weight_decay: float = option(0.0, "weight decay of the adapters")
    warmup: float = option(0.05, "fraction of the run over which rates rise")
    min_lr_ratio: float = option(0.1, "where the cosine ends, as a fraction of the peak")


@dataclass
class TrainerConfig:
    """The Lightning trainer."""

    max_steps: int = option(400, "optimiser steps")
    accumulate_grad_batches: int = option(1, "forward passes per optimiser step")
    precision: str = option("32-true", "32-true, bf16-mixed or bf16-true")
    gradient_clip_val: float | None = option(1.0, "clip the gradient norm; null for none")
    accelerator: str = option("auto", "auto, cpu or gpu")
    compile: bool = option(False, "torch.compile of the decoder: faster steps after minutes of compiling")
    val_checks: int = option(4, "validations spread over the run; 0 for none")
    log_every_n_steps: int = option(10, "steps between logged points")
    checkpoint_every_n_steps: int = option(50, "steps between checkpoints (Ctrl-C also writes one)")
    extra: dict[str, Any] = option({}, "further keyword arguments of lightning.Trainer")


@dataclass
class EvaluateConfig:
    """What is measured at the end."""

    batch_size: int = option(32, "sequences per evaluation batch")
    max_new_tokens: int = option(64, "longest generated answer")
    max_generate: int = option(64, "completions to generate per task for ROUGE")
    reference: bool = option(True, "also tune the dense model with LoRA on the same data and steps")
    baselines: list[str] = option(
        [],
        "prune at once, then tune: taylor, taylor_global, wanda, fluctuation, magnitude, uniform (magnitude within "
        "layers at equal widths), random, random_uniform",
    )
    samples: int = option(4, "generated samples kept for the report")
    normalise: str = option("task", "choices' log-likelihoods: task (as each task says), tokens, characters or none")
    stride: int | None = option(None, "tokens by which windows of long texts move; unset moves by whole windows")
    bootstrap: int = option(1000, "resamples of the 95% intervals and paired comparisons; 0 for none")
    forgetting: list[str] = option(
        ["legal", "health", "finance", "narrative"],
        "what pruning forgot: perplexity on these embedded domains or tasks besides the target",
    )
    max_forgetting: int = option(40, "records of each of them")
    tasks: list[str] = option([], "further tasks to score, embedded (health/qa) or known (boolq), trained on or not")
    path: Any = option(None, "local files of evaluate.tasks and evaluate.forgetting; as data.path")
    harness: bool = option(False, "score evaluate.tasks with lm-evaluation-harness (pip install 'atp[harness]')")
    harness_path: str | None = option(None, "folder of further task files of the harness")
    speed: bool = option(True, "measure prefill and decode latency of dense and pruned")
    speed_prompt_tokens: int = option(128, "prompt length of the speed measurement")
    speed_new_tokens: int = option(32, "decoded tokens of the speed measurement")
    speed_repeats: int = option(5, "repeats, dense and pruned in alternation")
    shared: str | None = option(
        None, "folder that keeps dense and dense + LoRA results for other runs; a sweep has one of its own"
    )


@dataclass
class ExportConfig:
    """How the pruned model is written."""

    dtype: str | None = option(None, "dtype of the exported weights; unset keeps the base model's")
    max_shard_size: str = option("5GB", "largest safetensors file")
    merge: bool = option(True, "merge the adapters; false writes the pruned base and a sliced PEFT adapter beside it")
    gguf: list[str] = option([], "GGUF files to write, by type: f32, f16, bf16, q8_0, or llama.cpp's K-quants")
    onnx: bool = option(False, "also write an ONNX graph with KV cache")
    verify: bool = option(True, "load every exported format in a fresh process and compare its logits")
    verify_tokens: int = option(1024, "tokens of the test data that formats are compared on")
    push_to_hub: str | None = option(None, "hub repository to upload the export to; never without being asked")
    public: bool = option(False, "make a new hub repository public; by default only its owner sees it")
    artifact: bool = option(False, "also hand the exported model to the loggers that keep artifacts (wandb, mlflow)")


@dataclass
class TrainConfig:
    """Everything of one run."""

    name: str = option("run", "name of the run; also its folder under runs/")
    run_dir: str = option("runs/${name}/${now:%Y-%m-%d_%H-%M-%S}", "where the run is written")
    resume: str | None = option(None, "run directory to go on with, or 'last'")
    seed: int = option(0, "seed of everything random")
    threads: int | None = option(None, "CPU threads; unset leaves it to torch")
    optimized_metric: str = option("eval.pruned.perplexity", "key of metrics.json that a sweep optimises")
    experiment: Any = option(None, "config group: a complete preset")
    sweep: Any = option(None, "config group: which values to run, by grid or search; starts a sweep")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict[str, Any] = option({}, "further Lightning callbacks, each a _target_ node (a class path)")
    logger: dict[str, Any] = option({}, "loggers beside the CSV file that every run has, each a _target_ node")
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


def folder_name(text: str) -> str:
    """A readable name for a folder, from overrides: no separators, at most 150 characters.

    Long names end in a digest of the whole, so that different overrides never share a folder.
    """
    name = re.sub(r"[^\w.,=+-]+", "_", text).strip("_,") or "default"
    if len(name) <= 150:
        return name
    return f"{name[:139]}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"


MOST_RAISED = 10.0
"""The most by which :func:`rate_per_run` raises a rate."""


def rate_per_run(rate: float, steps: int, max_steps: int) -> float:
    """A published rate for a run of another length: what the run's steps come to together stays the same.

    ``${per_run:RATE,STEPS,${trainer.max_steps}}`` in a preset. A shorter run raises the rate in proportion, at most
    tenfold; a longer one keeps it.

    Args:
        rate: Learning rate of the published run.
        steps: Its optimiser steps.
        max_steps: Optimiser steps of this run.
    """
    return float(rate) * min(max(steps / max(max_steps, 1), 1.0), MOST_RAISED)


# At import, since jobs in other processes resolve them before anything else of this package runs.
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("per_run", rate_per_run, replace=True)


def register_schema() -> None:
    """Make the schema known to Hydra; may be called repeatedly."""
    ConfigStore.instance().store(name=SCHEMA_NAME, node=TrainConfig)


def schema_fields(path: str) -> dict[str, type | None]:
    """Valid keys below a dotted config path, each with its nested dataclass (None for plain values).

    Raises:
        KeyError: The path leads to no dataclass.
    """
    node: Any = TrainConfig
    for part in filter(None, path.split(".")):
        node = _nested(node, part)
        if node is None:
            raise KeyError(path)
    return {name: _nested(node, name) for name in node.__dataclass_fields__}


def schema_default(path: str) -> Any:
    """Return the default of an option, as plain data; None for a path that the schema does not have."""
    node: Any = TrainConfig()
    for part in path.split("."):
        if not is_dataclass(node) or part not in node.__dataclass_fields__:
            return None
        node = getattr(node, part)
    return asdict(node) if is_dataclass(node) and not isinstance(node, type) else node


def _nested(node: Any, name: str) -> Any:
    item = node.__dataclass_fields__.get(name)
    factory = getattr(item, "default_factory", MISSING)
    return factory if hasattr(factory, "__dataclass_fields__") else None
