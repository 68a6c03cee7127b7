"""From configuration to objects: base model, tokenizer, data, training modules, trainer.

The only place where the typed configuration meets constructors; everything it calls takes plain keyword arguments.
``_target_`` nodes (generator, sampler, budget, loggers, callbacks) are instantiated here and nowhere else. It knows
nothing of the order of stages.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from atp import embedded, modeling_atp
from atp.architecture import family
from atp.aware import AwareModule
from atp.baselines import BASELINES, CALIBRATION_BATCHES, check_baselines
from atp.config import (
    DataConfig,
    LassoConfig,
    ModelConfig,
    PromptConfig,
    PruneConfig,
    ScheduleConfig,
    TrainConfig,
    WarmStartConfig,
)
from atp.cost import make_cost
from atp.data.batches import PruningDataModule
from atp.data.check import faults
from atp.data.columns import record_parser
from atp.data.domains import load_domain, scored_records
from atp.data.files import paths_of
from atp.data.overlap import check_overlap
from atp.data.records import Record, Splits, few_shot, limit
from atp.data.sources import load_embedded, load_files
from atp.data.streaming import StreamedRecords
from atp.data.tasks import NORMALISATIONS, find_task, load_tasks, nearest
from atp.evaluate import harness
from atp.lora import MaskedModel, add_lora
from atp.module import PruningModule, TuningModule
from atp.objective import SparsitySchedule
from atp.prompt import COLLABORATIVE, Prompt, from_text
from atp.selection import check_reachable
from atp.space import PruningSpace
from atp.units import CostModel

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_source(config: ModelConfig) -> str:
    """Directory or hub id of the base model.

    Raises:
        ValueError: ``model.path`` is not set, or is a path that does not exist.
    """
    if not config.path:
        raise ValueError("model.path is not set; give a directory in Hugging Face layout, a hub id, or 'embedded'")
    if config.path == "embedded":
        return str(embedded.base_dir())
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    path = Path(config.path).expanduser()
    if path.is_dir():
        return str(path)
    if looks_local:
        raise ValueError(
            f"model.path={config.path}: no such directory; give one that holds config.json and *.safetensors"
        )
    return config.path


def load_base(config: ModelConfig) -> PreTrainedModel:
    """The dense base model, frozen weights in ``model.dtype``, from safetensors only.

    Raises:
        ValueError: Unknown dtype or family, nothing to load, or no access; each says the way out.
    """
    source = model_source(config)
    if config.dtype not in DTYPES:
        raise ValueError(f"model.dtype is {config.dtype!r}; known: {', '.join(DTYPES)}")
    modeling_atp.register()
    try:
        family(AutoConfig.from_pretrained(source, revision=config.revision))
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            dtype=DTYPES[config.dtype],
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
        )
    except OSError as error:
        raise ValueError(_access_message("model.path", source, error)) from error
    model.eval()
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token.

    Raises:
        ValueError: There is none, or no access.
    """
    source = model_source(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision)
    except (OSError, ValueError) as error:
        raise ValueError(_access_message("model.path", source, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _access_message(field: str, source: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if Path(source).is_dir():
        return (
            f"{field}={source}: cannot be loaded ({reason}); it needs config.json, tokenizer files and "
            "*.safetensors weights"
        )
    return (
        f"{field}={source}: cannot be fetched from the hub ({reason}). Without network, use model=local "
        "model.path=<directory>; for a "
        "gated model, accept its licence on its page and log in with `hf auth login`"
    )


def load_splits(config: DataConfig, seed: int) -> Splits:
    """Training, validation and test records.

    Raises:
        ValueError: An unknown source, or whatever the source complains of.
    """
    shares = {"validation_fraction": config.validation_fraction, "test_fraction": config.test_fraction}
    if config.source == "embedded":
        splits = load_embedded(
            config.domain, train=config.max_train, validation=config.max_validation, test=config.max_test
        )
        splits = check_overlap(_only(splits, config.tasks or {}), config.near_duplicates)
    elif config.source == "files":
        if not config.path:
            raise ValueError("data.path is not set; give your file or folder: data=files data.path=<file>")
        splits = load_files(
            config.path,
            seed=seed,
            validation_path=config.validation_path,
            test_path=config.test_path,
            fields=config.fields or None,
            near_duplicates=config.near_duplicates,
            stream=config.stream,
            name=config.name,
            **shares,
        )
    elif config.source == "tasks":
        splits = load_domain(
            config.tasks or {},
            seed=seed,
            path=config.path,
            tasks_file=config.tasks_file,
            max_train=config.max_train,
            max_validation=config.max_validation,
            max_test=config.max_test,
            near_duplicates=config.near_duplicates,
            name=config.name,
            **shares,
        )
    else:
        raise ValueError(f"data.source is {config.source!r}; known: embedded, files, tasks")
    if config.stream and config.source != "files":
        log.warning("data.stream is ignored: only data=files can be streamed")
    return _limited(splits, config, seed)


def data_faults(config: DataConfig) -> tuple[list[str], int]:
    """What is wrong with the rows of the user's own files, each with its place, and how many are good."""
    if config.source != "files" or not config.path:
        return [], 0
    files = [
        file for value in (config.path, config.validation_path, config.test_path) if value for file in paths_of(value)
    ]
    return faults(files, record_parser(config.fields or None))


def _only(splits: Splits, tasks: Mapping[str, Any]) -> Splits:
    """The records of some of the embedded tasks."""
    if not tasks:
        return splits
    there = list(dict.fromkeys(record.task for record in splits.train))
    for task in tasks:
        if task not in there:
            raise ValueError(f"data.tasks: {splits.name} has no task {task!r}; {nearest(task, there)}")
    train, validation, test = (
        [record for record in some if record.task in tasks] for some in (splits.train, splits.validation, splits.test)
    )
    return replace(splits, train=train, validation=validation, test=test)


def _limited(splits: Splits, config: DataConfig, seed: int) -> Splits:
    train = splits.train
    if isinstance(train, StreamedRecords):
        if config.shots is not None:
            raise ValueError("data.shots and data.stream exclude each other; leave one of them out")
        train = train.limited(config.max_train)
    else:
        train = few_shot(limit(list(train), config.max_train, seed), config.shots, seed)
    return replace(
        splits,
        train=train,
        validation=limit(splits.validation, config.max_validation, seed),
        test=limit(splits.test, config.max_test, seed),
    )


def load_prompt(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt of a run, with the instructions of its tasks and, where there is one, the tokenizer's chat template.

    Raises:
        ValueError: A file that cannot be read, a template that is not valid, or an unknown ``prompt.chat``.
    """
    settings = _chosen_prompt(config)
    parts = {"system": settings.system, "template": settings.template}
    if settings.path:
        path = Path(settings.path).expanduser()
        try:
            parts = from_text(path.read_text(encoding="utf-8"), f"prompt.path={path}")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompt.path={path}: cannot be read ({error})") from None
    elif settings.name == "file":
        raise ValueError("prompt.path is not set; give your template: prompt=<file>")
    tasks = load_tasks(config.data.tasks_file)
    named = [find_task(name, tasks) for name in config.data.tasks or () if "/" in name]
    known = {task.name: task.instruction for task in (*tasks.values(), *named) if task.instruction}
    prompt = Prompt(
        settings.name,
        **parts,
        instructions={**known, **settings.instructions},
        train=settings.train,
        inference=settings.inference,
    )
    if settings.chat not in ("auto", "always", "never"):
        raise ValueError(f"prompt.chat is {settings.chat!r}; known: auto, always, never")
    template = getattr(tokenizer, "chat_template", None)
    if settings.chat == "always" and not isinstance(template, str):
        raise ValueError("prompt.chat=always, but the tokenizer has no chat template; use prompt.chat=auto or never")
    wanted = settings.chat == "always" or (settings.chat == "auto" and not prompt.is_empty)
    return replace(prompt, chat=template) if wanted and isinstance(template, str) else prompt


def _chosen_prompt(config: TrainConfig) -> PromptConfig:
    """The prompt asked for or, where none is, the collaborative one that belongs to the method."""
    own = config.prune.prompt
    if config.prompt.name != "none" or not (own.train or own.inference):
        return config.prompt
    text = COLLABORATIVE if own.text is None else own.text
    if not text.strip():
        raise ValueError(
            "prune.prompt.text is empty; leave it out for the usual text, or switch train and inference off"
        )
    return replace(config.prompt, name="collaborative", system=text, train=own.train, inference=own.inference)


def load_scored(config: TrainConfig, name: str, most: int) -> list[Record]:
    """Test records of an embedded domain or task or of a known task (:func:`atp.data.sources.scored_records`)."""
    path = config.evaluate.path if config.evaluate.path is not None else config.data.path
    path = path if config.data.source == "tasks" or config.evaluate.path is not None else None
    return scored_records(name, most=most, seed=config.seed, path=path, tasks_file=config.data.tasks_file)


def load_beyond(config: TrainConfig) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Records besides the target: of other domains, for their perplexity, and of further tasks; read before training.

    Raises:
        ValueError: An unknown name or a missing file, or the harness is asked for and lacks something.
    """
    settings = config.evaluate
    if settings.max_forgetting < 1 and settings.forgetting:
        raise ValueError(
            f"evaluate.max_forgetting is {settings.max_forgetting}; it must be at least 1. To measure none: "
            "evaluate.forgetting=[]"
        )
    own = {*(config.data.tasks or ()), *([config.data.domain] if config.data.source == "embedded" else [])}
    others = {
        name: load_scored(config, name, settings.max_forgetting) for name in settings.forgetting if name not in own
    }
    if settings.harness:
        harness.prepare(settings.tasks, settings.harness_path)
        return others, {}
    return others, {name: load_scored(config, name, config.data.max_test or 400) for name in settings.tasks}


def normalisation(config: TrainConfig) -> dict[str, str] | str:
    """How choices' log-likelihoods are compared: one way for all, or each task's own."""
    way = config.evaluate.normalise
    if way == "task":
        return {name: task.normalise for name, task in load_tasks(config.data.tasks_file).items()}
    if way not in NORMALISATIONS:
        raise ValueError(f"evaluate.normalise is {way!r}; known: task, {', '.join(NORMALISATIONS)}")
    return way


def data_module(
    config: TrainConfig, splits: Splits, tokenizer: PreTrainedTokenizerBase, context: int
) -> PruningDataModule:
    """Batches for the whole run."""
    if config.data.packing and config.model.attn_implementation != "sdpa":
        raise ValueError(
            f"data.packing needs model.attn_implementation=sdpa, got {config.model.attn_implementation!r}: packed "
            "records are kept apart by a mask that only it reads"
        )
    return PruningDataModule(
        splits,
        tokenizer,
        max_length=config.data.max_length,
        batch_size=config.data.batch_size,
        num_batches=config.trainer.max_steps * config.trainer.accumulate_grad_batches,
        seed=config.seed,
        loss_on=config.data.loss_on,
        num_workers=config.data.num_workers,
        model_context=context,
        packing=config.data.packing,
    )


def pruning_space(config: PruneConfig, model: PreTrainedModel) -> PruningSpace:
    """The space of a model, with the target checked to be reachable in it."""
    space = PruningSpace.from_model(model, config.space, config.protect_layers)
    space.cost = cost_model(config, model)
    check_reachable(space, config.sparsity, min_units(config), round_to=config.round_to)
    return space


def cost_model(config: PruneConfig, model: PreTrainedModel) -> CostModel:
    """What the budget counts.

    Raises:
        ValueError: An unknown cost, or a context below 1.
    """
    table = Path(config.latency_table) if config.latency_table else None
    return make_cost(config.budget_of, context=config.budget_context, model=model, table=table)


def min_units(config: PruneConfig) -> dict[str, int]:
    """Units that every layer keeps."""
    for name, value in (("min_heads", config.min_heads), ("min_channels", config.min_channels)):
        if value < 0:
            raise ValueError(f"prune.{name} is {value}; it is a number of units and cannot be negative")
    return {"heads": config.min_heads, "channels": config.min_channels}


def pruning_module(config: TrainConfig, model: PreTrainedModel) -> PruningModule:
    """Masks and adapters over a base model, ready to train."""
    prune = config.prune
    space = pruning_space(prune, model)
    schedule = SparsitySchedule.from_fractions(
        prune.sparsity,
        config.trainer.max_steps,
        warmup=prune.schedule.warmup,
        ramp=prune.schedule.ramp,
        freeze_at=prune.schedule.freeze_at,
        shape=prune.schedule.shape,
    )
    masked = MaskedModel(_with_lora(config, model), space)
    lasso = prune.lasso
    aware: dict[str, Any] = {
        "update": prune.update,
        "lora_aware": prune.lora_aware,
        "lasso": lasso.weight,
        "final_lasso": lasso.final_weight,
        "final_from": lasso.final_from,
    }
    is_plain = prune.update == "joint" and not prune.lora_aware and not lasso.weight and not lasso.final_weight
    make: Any = PruningModule if is_plain else functools.partial(AwareModule, **aware)
    module: PruningModule = make(
        masked,
        component("prune.generator", prune.generator, space=space),
        component("prune.sampler", prune.sampler),
        component("prune.budget", prune.budget),
        schedule,
        generator_lr=prune.generator_lr,
        multiplier_lr=prune.multiplier_lr,
        shape=prune.shape,
        min_units=min_units(prune),
        compaction=prune.compact,
        restore_ridge=prune.restore.ridge,
        round_to=prune.round_to,
        gates=prune.gates,
        distill=config.optim.distill,
        **_tuning(config),
    )
    return module


def tuning_module(config: TrainConfig, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> TuningModule:
    """Plain LoRA over a model, distilled as the pruned model is where a teacher is given."""
    distill = config.optim.distill if teacher is not None else 0.0
    return TuningModule(_with_lora(config, model), distill=distill, teacher=teacher, **_tuning(config))


def two_stage(config: TrainConfig, name: str) -> TrainConfig:
    """The run's configuration with its method replaced by the two-stage baseline of that name.

    Raises:
        ValueError: An unknown baseline.
    """
    check_baselines([name])
    baseline = BASELINES[name]
    prune = replace(
        config.prune,
        name=name,
        gates="binary",
        update="joint",
        lora_aware=False,
        lasso=LassoConfig(),
        shape=baseline.shape,
        generator={"_target_": "atp.generator.FixedScores"},
        sampler={"_target_": "atp.sampler.Threshold"},
        budget={"_target_": "atp.objective.Projection"},
        warm_start=WarmStartConfig(batches=CALIBRATION_BATCHES, criterion=baseline.criterion, ranking=baseline.ranking),
        schedule=ScheduleConfig(warmup=0.0, ramp=0.0, freeze_at=0.0),
    )
    return replace(config, prune=prune)


def _with_lora(config: TrainConfig, model: PreTrainedModel) -> Any:
    lora = config.lora
    peft_model = add_lora(model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return peft_model


def _tuning(config: TrainConfig) -> dict[str, Any]:
    optim = config.optim
    return {
        "total_steps": config.trainer.max_steps,
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "warmup": optim.warmup,
        "min_lr_ratio": optim.min_lr_ratio,
        "seed": config.seed,
        "base_id": config.model.path or "",
    }


def component(place: str, node: Mapping[str, Any], **provided: Any) -> Any:
    """Instantiate a ``_target_`` node, handing over those of ``provided`` that its constructor takes.

    Raises:
        ValueError: No target, an unknown one, or an argument it does not take, with the nearest that it does.
    """
    target = node.get("_target_")
    if not target:
        raise ValueError(f"{place} has no _target_; choose one with {place.replace('.', '/')}=<name> (see --help)")
    try:
        factory = get_object(str(target))
    except Exception as error:
        raise ValueError(f"{place}._target_ is {target!r}, which cannot be imported: {error}") from error
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in node:
        if name not in parameters and not name.startswith("_") and not takes_any:
            close = difflib.get_close_matches(name, list(parameters), n=1)
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else f"it takes {', '.join(p for p in parameters if p != 'space')}"
            )
            raise ValueError(f"{place}.{name}: {target} takes no such argument; {hint}")
    wanted = {name: value for name, value in provided.items() if name in parameters}
    try:
        return instantiate(dict(node), _convert_="all", **wanted)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from error
        raise


def make_loggers(config: TrainConfig, run_dir: Path) -> list[Logger]:
    """Loggers chosen by ``logger=``, besides the CSV file."""
    return [
        component(f"logger.{name}", node, save_dir=str(run_dir / name), name=config.name)
        for name, node in config.logger.items()
    ]


def make_trainer(
    config: TrainConfig,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    num_batches: int,
    run_dir: Path = Path(),
) -> Trainer:
    """The Lightning trainer of one fit."""
    settings = config.trainer
    for name in ("max_steps", "accumulate_grad_batches", "log_every_n_steps"):
        if getattr(settings, name) < 1:
            raise ValueError(f"trainer.{name} is {getattr(settings, name)}; it must be at least 1")
    own = [component(f"callbacks.{name}", node, run_dir=str(run_dir)) for name, node in config.callbacks.items()]
    validates = settings.val_checks > 0
    return Trainer(
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        precision=settings.precision,  # type: ignore[arg-type]
        gradient_clip_val=settings.gradient_clip_val,
        accelerator=settings.accelerator,
        devices=1,
        log_every_n_steps=settings.log_every_n_steps,
        val_check_interval=max(num_batches // settings.val_checks, 1) if validates else None,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, *own],
        logger=list(loggers),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings.extra,
    )


def device_of(config: TrainConfig) -> torch.device:
    """Where evaluation runs: beside training."""
    return torch.device(
        "cuda" if config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"
    )
