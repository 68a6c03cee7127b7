"""Every shipped preset builds: method, data, trainer; and the loggers around a fit."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from atp.commands.train import compose_config
from atp.config.schema import TrainConfig, config_dir
from atp.model.gguf.packages import PACKAGED
from atp.prepare.baselines import BASELINES
from atp.run import parts
from atp.train.joint import PruningModule
from atp.train.loggers import merge_csv
from atp.train.login import is_logged_in

ROOT = Path(config_dir())


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / group).glob("*.yaml"))


def config(*overrides: str) -> TrainConfig:
    made = OmegaConf.to_object(compose_config(overrides))
    assert isinstance(made, TrainConfig)
    return made


@pytest.mark.parametrize("preset", names("prune"))
def test_every_method_builds(preset: str) -> None:
    made = config(f"prune={preset}")
    module = parts.pruning_module(made, parts.load_base(made.model))
    assert isinstance(module, PruningModule)
    assert module.generator().shape == (module.space.num_units,)
    groups = {group["name"] for group in module.parameter_groups()}
    assert "lora" in groups
    assert ("generator" in groups) is any(p.requires_grad for p in module.generator.parameters())
    module.freeze_masks()  # the architecture that scores as they are now lead to
    space = module.space
    unit = space.layers[0].costs.channel * (len(space.layers) if module.shape == "uniform" else 1)
    kept = round(float(space.remaining_parameters(module.final_masks_U.double())))  # a count, which sums of floats miss
    reached = 1.0 - kept / space.total_parameters
    assert made.prune.sparsity - unit / space.total_parameters < reached <= made.prune.sparsity


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_and_preset_of_one_name_are_one_method(name: str) -> None:
    preset, baseline = config(f"prune={name}").prune, parts.two_stage(config("prune=l0"), name).prune
    for field in ("shape", "sampler", "schedule", "generator", "budget"):
        mine, other = getattr(preset, field), getattr(baseline, field)
        if isinstance(mine, dict):
            mine, other = mine["_target_"], other["_target_"]
        if field == "schedule":
            assert mine.freeze_at == other.freeze_at == 0.0
        else:
            assert mine == other, field
    first, second = preset.warm_start, baseline.warm_start
    assert (first.criterion, first.ranking) == (second.criterion, second.ranking)


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """Records by the settings they come from, which several experiments share."""
    return {}


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_builds(experiment: str, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole preset where it needs no hub; otherwise everything but its model and data, which say so clearly."""
    made = config(f"experiment={experiment}")
    if made.trainer.accelerator != "gpu":
        parts.make_trainer(made, [], [], made.trainer.max_steps)
    if made.model.path == "embedded":
        base = parts.load_base(made.model)
        key = repr((made.data, made.seed))
        splits = loaded[key] = loaded.get(key) or parts.load_splits(made.data, made.seed)
        data = parts.data_module(made, splits, parts.load_tokenizer(made.model), base.config.max_position_embeddings)
        data.setup("fit")
        assert len(data.train_dataloader()) == made.trainer.max_steps * made.trainer.accumulate_grad_batches
        parts.pruning_module(made, base)
    elif made.model.path in PACKAGED:  # the package is seldom there; its loading has tests of its own
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(ValueError, match="is not installed: pip install"):
            parts.load_base(made.model)
    else:
        with pytest.raises(ValueError, match="cannot be fetched from the hub"):
            parts.load_base(made.model)


@pytest.mark.parametrize("data", [name for name in names("data") if name.startswith("embedded")])
def test_every_embedded_domain_loads(data: str) -> None:
    splits = parts.load_splits(config(f"data={data}", "data.max_train=50").data, 0)
    assert len(splits.train) == 50 and splits.validation and splits.test


def test_real_legal_files_load(shared: Path) -> None:
    path = shared / "data" / "legal"
    made = config("data=jsonl", f"data.path={path / 'uscode_sections.jsonl'}", "data.max_test=30")
    splits = parts.load_splits(made.data, 0)
    assert len(splits.train) > 2500 and len(splits.test) == 30
    tasks = {record.task for record in parts.load_splits(config("data=legal", f"data.path={path}").data, 0).train}
    assert tasks == {"casehold", "billsum"}


def test_real_checkpoint_prunes_exactly(shared: Path) -> None:
    """A checkpoint nobody here trained: masked equals removed."""
    import torch

    from atp.cut.removal import max_logit_difference, remove
    from atp.cut.selection import select
    from atp.masks.merging import merged_tensors

    made = config("model=local", f"model.path={shared / 'models' / 'stories260K'}")
    base = parts.load_base(made.model)
    dense_config = base.config
    module = parts.pruning_module(made, base).eval()
    masks_U = select(module.space, torch.randn(module.space.num_units), 0.5)
    module.masked.set_masks(masks_U)
    small = remove(merged_tensors(module.masked.peft_model), dense_config, module.space, masks_U)
    ids = torch.randint(3, 512, (2, 40))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert max_logit_difference(module.masked, small, [batch]) < 1e-4


def test_login_is_looked_up_without_asking(tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    netrc.chmod(0o600)
    assert is_logged_in({"WANDB_API_KEY": "x"})
    assert is_logged_in({"NETRC": str(netrc)})
    assert not is_logged_in({"NETRC": str(netrc), "WANDB_BASE_URL": "https://wandb.example.org"})
    assert not is_logged_in({"NETRC": str(tmp_path / "absent")})


def test_a_row_that_a_kill_cut_short_is_left_out_of_the_joined_log(tmp_path: Path) -> None:
    for part, text in enumerate(("epoch,step,train/loss\n0,0,a\n0,1,b\n0", "epoch,step,train/loss\n0,1,B\n0,2,C\n")):
        (tmp_path / f"part_{part}").mkdir()
        (tmp_path / f"part_{part}" / "metrics.csv").write_text(text)
    merge_csv(tmp_path, tmp_path / "train.csv")
    with (tmp_path / "train.csv").open(newline="") as file:
        assert [row["train/loss"] for row in csv.DictReader(file)] == ["a", "B", "C"]


def test_resumed_parts_of_a_log_join_without_doubles(tmp_path: Path) -> None:
    for part, rows in enumerate(([(0, "a"), (1, "b"), (2, "c")], [(1, "B"), (2, "C"), (3, "D")])):
        folder = tmp_path / f"part_{part}"
        folder.mkdir()
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "train/loss"), *rows])
    merge_csv(tmp_path, tmp_path / "train.csv")
    with (tmp_path / "train.csv").open(newline="") as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == [("0", "a"), ("1", "B"), ("2", "C"), ("3", "D")]
