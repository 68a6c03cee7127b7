"""Settings that a library would refuse in its own words, hours later: one line that names ours, before anything."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from atp.commands.train import compose_config, main
from atp.config.schema import TrainConfig
from atp.errors import UserError
from atp.run import parts
from atp.run.checks import check_machine, check_values


@functools.cache
def composed() -> DictConfig:
    return compose_config(["experiment=smoke"])


def config(*overrides: str) -> TrainConfig:
    made = OmegaConf.to_object(compose_config(["experiment=smoke", *overrides]) if overrides else composed())
    assert isinstance(made, TrainConfig)
    return made


def changed(made: TrainConfig, name: str, value: object) -> TrainConfig:
    *groups, last = name.split(".")
    node: object = made
    for group in groups:
        node = getattr(node, group)
    setattr(node, last, value)
    return made


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("seed", -1, "between 0 and 4294967295"),
        ("seed", 2**32, "between 0 and 4294967295"),
        ("threads", 0, "between 1 and"),
        ("threads", 10**9, "between 1 and"),
        ("optim.lr", -1e-3, "at least 0"),
        ("optim.lr", float("nan"), "finite"),
        ("lora.alpha", float("inf"), "finite"),
        ("optim.warmup", 2.0, "between 0 and 1"),
        ("data.batch_size", 0, "at least 1"),
        ("data.num_workers", -1, "at least 0"),
        ("data.max_train", -5, "at least 0"),
        ("trainer.max_steps", -1, "at least 1"),
        ("trainer.val_checks", -1, "at least 0"),
        ("trainer.checkpoint_every_n_steps", 0, "at least 1"),
        ("trainer.precision", "fp16", "known: 32-true, bf16-mixed, bf16-true, 16-mixed"),
        ("trainer.accelerator", "cuda:1", "known: auto, cpu, gpu"),
        ("model.dtype", "bf16", "did you mean 'bfloat16'"),
        ("model.attn_implementation", "flash", "known: sdpa, eager"),
        ("evaluate.speed_repeats", 0, "at least 1"),
        ("evaluate.stride", 0, "at least 1"),
        ("evaluate.normalise", "token", "did you mean 'tokens'"),
        ("optimized_metric", "eval.prunned.perplexity", "models dense, pruned, dense_lora"),
        ("export.verify_tokens", 0, "at least 1"),
        ("prune.generator_lr", -0.1, "at least 0"),
        ("prune.repair.batches", -1, "at least 0"),
    ],
)
def test_values_that_no_machine_takes(name: str, value: object, way_out: str) -> None:
    with pytest.raises(UserError) as refused:
        check_values(changed(config(), name, value))
    message = str(refused.value)
    assert message.startswith(f"{name} is ") and way_out in message and "\n" not in message


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"devices": 2}, r"trainer\.extra\.devices=2: a run takes one device"),
        ({"strategy": "ddp"}, r"trainer\.extra\.strategy=ddp: a run takes one device"),
        ({"benchmrk": True}, r"trainer\.extra\.benchmrk: .*no such argument; did you mean 'benchmark'"),
        ({"max_epochs": 3}, r"trainer\.extra\.max_epochs: .*use trainer\.max_steps"),
        ({"logger": True}, r"trainer\.extra\.logger: .*use logger"),
    ],
)
def test_further_arguments_of_the_trainer(extra: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(changed(config(), "trainer.extra", extra))


@pytest.mark.parametrize("override", ["trainer.extra={devices: 2}", "+trainer.extra.devices=2"])
def test_further_arguments_are_taken_with_and_without_a_plus(override: str) -> None:
    assert config(override).trainer.extra == {"devices": 2}


def test_further_arguments_reach_the_trainer() -> None:
    made = changed(config(), "trainer.extra", {"deterministic": True, "gradient_clip_algorithm": "value"})
    check_values(made)
    check_machine(made)
    assert parts.make_trainer(made, [], [], 8).gradient_clip_algorithm == "value"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("trainer.extra", {"gradient_clip_algorithm": "foo"}, r"trainer\.extra \(gradient_clip_algorithm=foo\): light"),
        ("trainer.extra", {"profiler": "foo"}, r"trainer\.extra \(profiler=foo\): lightning refuses"),
        ("trainer.extra", {"plugins": "foo"}, r"trainer\.extra \(plugins=foo\): lightning refuses"),
        ("model.attn_implementation", "flash_attention_2", r"flash_attention_2 needs .*attn_implementation=sdpa"),
        ("trainer.accelerator", "gpu", r"trainer\.accelerator=gpu, but .*trainer\.accelerator=cpu"),
        ("trainer.precision", "16-mixed", r"trainer\.precision=16-mixed needs a GPU.*trainer\.precision=32-true"),
    ],
)
def test_what_this_machine_cannot_do(name: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = changed(config(), name, value)
    check_values(made)
    with pytest.raises(UserError, match=message) as refused:
        check_machine(made)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"},
        {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    ],
)
def test_schedulers_environment_is_told_and_not_followed(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 2)
    made = changed(config(), "trainer.accelerator", "cpu")
    check_machine(made)
    assert "is ignored: a run is one process" in caplog.text
    trainer = parts.make_trainer(made, [], [], 8)
    assert trainer.world_size == 1 and trainer.global_rank == 0
    assert rank_zero_only.rank == 0  # loggers write


def test_command_line_ends_with_two_and_leaves_nothing(
    tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["experiment=smoke", "trainer.precision=fp16"])
    assert stop.value.code == 2 and os.listdir(tmp_path) == []
    assert capsys.readouterr().err.startswith("error: trainer.precision is 'fp16'")
