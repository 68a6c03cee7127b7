"""Settings without effect: which are told, and which presets stay quiet."""

from __future__ import annotations

import logging

import pytest
from test_build import config, names

from atp.run import parts
from atp.run.parts.ignored import ignored


def told(caplog: pytest.LogCaptureFixture, *overrides: str, level: int = logging.WARNING) -> list[str]:
    """What is told of a run with these overrides."""
    made = config(*overrides)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        module = parts.pruning_module(made, parts.load_base(made.model))
        parts.tell_settings(made, module, list(overrides))
    return [record.getMessage() for record in caplog.records if record.levelno == level and "is ignored" in record.msg]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["prune=compresso"], "prune.space"),
        (["prune=l0", "prune.gates=soft"], "prune.gates is soft"),
        (["prune=l0", "prune.lora_aware=true"], "prune.lora_aware is true"),
        (["prune=l0", "prune.lasso.weight=0.3"], "prune.lasso is on"),
    ],
)
def test_why_the_live_model_is_not_cut_is_told_and_a_warning_where_it_was_asked_for(
    overrides: list[str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = told(caplog, *overrides, level=logging.INFO)
    assert line.startswith("prune.compact is ignored") and reason in line
    assert not told(caplog, *overrides)
    (warning,) = told(caplog, *overrides, "prune.compact=true")
    assert warning == line
    assert not told(caplog, *overrides, "prune.compact=false", level=logging.INFO)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["prune=exact", "prune.multiplier_lr=2.0"], "Projection has no Lagrange multipliers"),
        (["prune=taylor", "prune.generator_lr=0.2"], "FixedScores has nothing to train"),
        (["prune=l0", "prune.space=[channels]", "prune.min_heads=2"], "prune.space has no heads"),
        (
            ["prune=l0", "prune.space=[heads]", "prune.sparsity=0.1", "prune.min_channels=2"],
            "prune.space has no channels",
        ),
        (["prune=l0", "prune.space=[heads]", "prune.sparsity=0.1", "prune.round_to=8"], "neither channels nor hidden"),
        (["prune=l0", "prune.repair.at=start"], "prune.repair.batches is 0"),
        (["prune=exact", "prune.repair.epochs=0", "prune.repair.lr=0.1"], "prune.repair.epochs is 0"),
        (["prune=l0", "prune.warm_start.criterion=[wanda]"], "prune.warm_start.batches is 0"),
        (["prune=l0", "prune.progressive.below=0.1"], "prune.progressive.cuts is 0"),
        (["prune=l0", "prune.lasso.final_from=0.9"], "prune.lasso.final_weight is 0"),
        (["prune=taylor", "prune.schedule.shape=linear"], "prune.schedule.ramp is 0"),
        (["prune=l0", "prune.distill.until=0.1"], "prune.distill.hidden is 0"),
        (["prune=l0", "prune.budget_context=64"], "prune.budget_of is parameters"),
        (["prune=l0", "prune.latency_table=t.json"], "prune.budget_of is parameters"),
    ],
)
def test_a_named_setting_without_effect_is_told(
    overrides: list[str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    (warning,) = told(caplog, *overrides)
    assert warning.startswith(f"{overrides[-1]} is ignored: ") and reason in warning


def test_a_run_says_what_its_masks_learn_at(caplog: pytest.LogCaptureFixture) -> None:
    def said(*overrides: str) -> list[str]:
        made = config(*overrides)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            parts.tell_settings(made, parts.pruning_module(made, parts.load_base(made.model)), list(overrides))
        return [record.getMessage() for record in caplog.records if record.getMessage().startswith("masks learn")]

    rates = "generator_lr 0.00375; lasso 0.3, 100 from step 200"
    assert said("prune=atp") == [f"masks learn until step 200 of 400: {rates}"]
    assert said("prune=l0") == ["masks learn until step 160 of 400: generator_lr 0.2; multiplier_lr 3"]
    assert not said("prune=taylor")


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["prune=atp"], 0.00375),  # 0.001 over 1,500 steps, in 400
        (["prune=atp_joint", "trainer.max_steps=1000"], 0.0015),
        (["prune=atp", "trainer.max_steps=20"], 0.01),  # at most tenfold
        (["prune=atp", "trainer.max_steps=5000"], 0.001),
        (["prune=atp", "prune.generator_lr=0.005"], 0.005),  # the user's own stands
        (["prune=atp_paper"], 0.001),
    ],
)
def test_a_preset_scales_a_published_rate_to_the_run(overrides: list[str], rate: float) -> None:
    assert config(*overrides).prune.generator_lr == pytest.approx(rate)


@pytest.mark.parametrize("preset", names("prune"))
def test_presets_give_no_warning(preset: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not told(caplog, f"prune={preset}")


def test_every_name_told_is_one_of_the_schema() -> None:
    made = config("prune=taylor", "prune.space=[heads]", "prune.sparsity=0.1", "prune.warm_start.batches=0")
    module = parts.pruning_module(made, parts.load_base(made.model))
    for name, _ in ignored(made, module):
        *groups, last = name.split(".")
        node = made.prune
        for group in groups:
            node = getattr(node, group)
        assert hasattr(node, last), name
