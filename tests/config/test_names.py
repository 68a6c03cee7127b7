"""Short names of classes: each builds its class, older paths build the same one, unknown ones name the nearest."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import tiny_model
from hydra.utils import get_object
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn

from atp.config.names import _MOVED, CLASSES, class_path, with_short_names
from atp.config.schema import config_dir
from atp.errors import UserError
from atp.masks.budget import Budget
from atp.masks.generator import Generator
from atp.masks.sampler import Sampler
from atp.run.parts.components import component
from atp.space.space import PruningSpace

BEFORE = {  # every `_target_` that the YAML files of conf/ had before classes had short names
    "atp.generator.FreeLogits": "free_logits",
    "atp.generator.TransformerGenerator": "transformer_generator",
    "atp.generator.GRUGenerator": "gru_generator",
    "atp.generator.GradientScores": "gradient_scores",
    "atp.generator.FixedScores": "fixed_scores",
    "atp.sampler.GumbelSigmoid": "gumbel_sigmoid",
    "atp.sampler.HardConcrete": "hard_concrete",
    "atp.sampler.Threshold": "threshold",
    "atp.objective.L0Lagrangian": "l0_lagrangian",
    "atp.objective.LogRatio": "log_ratio",
    "atp.objective.Projection": "projection",
    "atp.callbacks.StopBadTrial": "stop_bad_trial",
    "atp.loggers.mlflow_logger": "mlflow_logger",
    "atp.loggers.tensorboard_logger": "tensorboard_logger",
    "atp.loggers.wandb_logger": "wandb_logger",
}
KINDS = {
    "atp.masks.generator": Generator,
    "atp.masks.sampler": Sampler,
    "atp.masks.budget": Budget,
    "atp.train.trials": Callback,
    "atp.train.loggers": Logger,
}
NEEDS = {"mlflow_logger": "mlflow", "tensorboard_logger": "tensorboard", "wandb_logger": "wandb"}


@pytest.fixture(scope="module")
def space() -> PruningSpace:
    return PruningSpace.from_model(tiny_model())


def build(target: str, space: PruningSpace, folder: Path) -> Any:
    """What ``_target_: target`` in a YAML gives, with whatever the builders provide."""
    node = {"_target_": target}
    return component("prune.generator", node, space=space, run_dir=str(folder), save_dir=str(folder), name="run")


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in NEEDS])
def test_every_short_name_builds(name: str, space: PruningSpace, tmp_path: Path) -> None:
    module, _, of = CLASSES[name].rpartition(".")
    built = build(name, space, tmp_path)
    assert isinstance(built, KINDS[module])
    assert (type(built).__module__, type(built).__name__) == (module, of)


@pytest.mark.parametrize("name", NEEDS)
def test_every_logger_is_found_and_those_installed_build(name: str, space: PruningSpace, tmp_path: Path) -> None:
    assert callable(get_object(class_path(name)))
    if name == "tensorboard_logger" and importlib.util.find_spec("tensorboard"):
        assert isinstance(build(name, space, tmp_path), Logger)


@pytest.mark.parametrize(("path", "name"), BEFORE.items())
def test_an_older_path_is_the_same_class(path: str, name: str, space: PruningSpace, tmp_path: Path) -> None:
    assert class_path(path) == class_path(name) == CLASSES[name]
    assert get_object(class_path(path)) is get_object(CLASSES[name])
    if name not in NEEDS:
        assert type(build(path, space, tmp_path)) is type(build(name, space, tmp_path))


def test_no_module_that_has_moved_is_forgotten() -> None:
    assert {path.rpartition(".")[0] for path in BEFORE} == set(_MOVED)
    assert set(BEFORE.values()) <= set(CLASSES)
    assert {importlib.util.find_spec(module) for module in _MOVED} == {None}  # else the older name were ambiguous


def targets_of(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets_of(value)]
    return [target for value in node for target in targets_of(value)] if isinstance(node, list) else []


def test_shipped_files_use_short_names_alone() -> None:
    files = [path for path in Path(config_dir()).rglob("*.yaml") if path.name != "train.yaml"]  # Hydra's own callback
    found = {target for path in files for target in targets_of(yaml.safe_load(path.read_text(encoding="utf-8")))}
    assert found == set(CLASSES)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("free_logit", "free_logits"),
        ("gumbel_sigmoids", "gumbel_sigmoid"),
        ("LogRatio", "log_ratio"),
        ("atp.masks.generator.FreeLogit", "atp.masks.generator.FreeLogits"),
        ("atp.generators.FreeLogits", "atp.masks.generator.FreeLogits"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(given: str, nearest: str, space: PruningSpace) -> None:
    with pytest.raises(UserError, match=rf"prune\.generator\._target_ is '{re.escape(given)}'.*") as error:
        component("prune.generator", {"_target_": given}, space=space)
    assert f"did you mean '{nearest}'?" in str(error.value)


def test_a_name_like_no_other_lists_all(space: PruningSpace) -> None:
    with pytest.raises(UserError, match="cannot be imported") as error:
        component("prune.generator", {"_target_": "xyz"}, space=space)
    assert "did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in CLASSES)


def test_no_target_is_told_with_what_to_type(space: PruningSpace) -> None:
    with pytest.raises(UserError, match=r"choose one with prune/generator=<name>"):
        component("prune.generator", {}, space=space)


def test_a_class_of_the_users_own_is_taken_by_its_path(space: PruningSpace) -> None:
    assert isinstance(component("prune.sampler", {"_target_": "torch.nn.Identity"}), nn.Identity)


@given(st.lists(st.text("abcdeABC_", min_size=1, max_size=5), min_size=1, max_size=3))
def test_other_paths_stay_as_they_are(parts: list[str]) -> None:
    path = ".".join(["mine", *parts])
    assert class_path(path) == path
    assert with_short_names({"_target_": path, "width": 3}) == {"_target_": path, "width": 3}


SPELLINGS = [(name, spelling) for path, name in BEFORE.items() for spelling in (name, path, CLASSES[name])]
VALUES = st.integers() | st.text(max_size=5) | st.none()


@given(st.lists(st.sampled_from(SPELLINGS), max_size=4), st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
def test_spellings_of_one_class_are_equal(spellings: list[tuple[str, str]], other: dict[str, Any]) -> None:
    other.pop("_target_", None)
    written = {"callbacks": [{"_target_": spelling, **other} for _, spelling in spellings], "prune": other}
    expected = {"callbacks": [{"_target_": name, **other} for name, _ in spellings], "prune": other}
    assert with_short_names(written) == expected
    assert with_short_names(expected) == expected
