"""Settings under the names they had before: on the command line, in a user's YAML, in the directory of an old run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_report import make_metrics

from atp.commands import train
from atp.commands.train import compose_config
from atp.config import moved
from atp.config.help import help_text
from atp.config.names import class_path
from atp.config.schema import TrainConfig, config_dir
from atp.errors import UserError
from atp.report.runs import find_runs, varied_settings
from atp.run import pipeline
from atp.run.directory import RunDirectory
from atp.run.parts import check_start

CASES = [  # what a user gave before, what is given now, what the warnings say
    (["prune.restore.batches=3"], ["prune.repair.batches=3"], ["prune.restore.batches is now prune.repair.batches"]),
    (["++prune.restore.at=start"], ["++prune.repair.at=start"], ["prune.repair.at"]),
    (
        ["prune.restore={batches: 3, at: start}"],
        ["prune.repair.batches=3", 'prune.repair.at="start"'],
        ["prune.repair.at"],
    ),
    (["optim.distill=0.3", "seed=1"], ["prune.distill.logits=0.3", "seed=1"], ["is now prune.distill.logits"]),
    (
        ["prune.prompt.train=true"],
        ["prompt=collaborative", "prompt.inference=false", "prompt.train=true"],
        ["prompt.train"],
    ),
    (
        ["prompt=none", "prune.prompt={train: true, text: 'Be brief.'}"],
        ["prompt=collaborative", "prompt.inference=false", "prompt.train=true", 'prompt.system="Be brief."'],
        ["prompt.train", "prompt.system"],
    ),
    (["prune=compresso", "prune.prompt.inference=false"], ["prune=compresso", "prompt.inference=false"], []),
    (["prompt=task", "prune.prompt.train=true"], ["prompt=task"], ["prompt.train=true is ignored"]),
    (
        ["prune.warm_start.criterion='taylor|wanda|taylor+wanda'"],
        ["prune.warm_start.criterion=[taylor,wanda,taylor+wanda]"],
        ["prune.warm_start.criterion is now a list, [taylor,wanda,taylor+wanda]"],
    ),
    (["prune.warm_start.criterion=wanda"], ["prune.warm_start.criterion=[wanda]"], ["a list, [wanda]"]),
]
GLOBAL = "# @package _global_\n"
FILES = [
    ("experiment", GLOBAL + "prune: {restore: {batches: 3}}\noptim: {distill: 0.2}\n", "prune.repair.batches=3"),
    ("optim", "lr: 0.3\ndistill: 0.2\n", "optim.lr=0.3"),
    ("prune", "defaults: [exact, _self_]\nrestore: {epochs: 2}\nname: exact\n", "prune.repair.epochs=2"),
    (
        "prune",
        "defaults: [exact]\nwarm_start: {criterion: taylor | wanda}\n",
        "prune.warm_start.criterion=[taylor,wanda]",
    ),
]


def plain(*overrides: str) -> dict[str, Any]:
    """A composed configuration; its folder is named after the moment and left out."""
    made: Any = OmegaConf.to_container(compose_config([*overrides, "run_dir=here"]), resolve=True)
    return dict(made)


@pytest.fixture(autouse=True)
def untold() -> None:
    moved._tell.cache_clear()


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the YAML tree that a user has added to."""
    folder = tmp_path / "conf"
    shutil.copytree(config_dir(), folder)
    monkeypatch.setattr(train, "config_dir", lambda: str(folder))
    return folder


@pytest.mark.parametrize(("older", "newer", "told"), CASES)
def test_an_older_name_on_the_command_line_is_the_new_one_with_a_warning(
    older: list[str], newer: list[str], told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert train._readable(older) == newer
    warnings = [record.message for record in caplog.records]
    assert warnings and all(any(text in warning for warning in warnings) for text in told)
    assert train._readable(newer) == newer
    assert len(warnings) == len(set(warnings)) == len(caplog.records)  # one line each, and none for new names


def test_a_name_of_now_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    plain("experiment=smoke", "prune=compresso", "prune.warm_start.criterion=[taylor,wanda]", "prompt.train=false")
    assert not caplog.records


def test_an_older_name_composes_to_what_the_new_one_does() -> None:
    older, newer = (
        [f"prune.{repair}.at=freeze", f"{distill}=0.3", f"prune.warm_start.criterion={criterion}"]
        for repair, distill, criterion in (
            ("restore", "optim.distill", "'taylor|wanda'"),
            ("repair", "prune.distill.logits", "[taylor,wanda]"),
        )
    )
    made = plain(*older)
    assert made == plain(*newer) and made["prune"]["warm_start"]["criterion"] == ["taylor", "wanda"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["prune.restore.batches=3", "prune.repair.batches=4"],
        ["prune.restore={batches: 3}", "+prune.repair.batches=4"],
        ["prune.restore.batches=3", "prune.repair={batches: 4}"],
        ["optim.distill=0.1", "prune.distill.logits=0.1"],
        ["prune.prompt.train=true", "prompt.train=true"],
    ],
)
def test_both_names_at_once_are_refused(overrides: list[str]) -> None:
    older, newer = (override.lstrip("+").partition("=")[0] for override in overrides)
    with pytest.raises(UserError) as refused:
        plain(*overrides)
    assert older in str(refused.value) and newer in str(refused.value)


def test_older_names_are_swept(caplog: pytest.LogCaptureFixture) -> None:
    swept = [
        "-m",
        "prune.restore.batches=1,2",
        "prune.warm_start.criterion=taylor,wanda",
        "prune.prompt.train=true,false",
    ]
    assert train._readable([*swept, "--cfg", "job"]) == [
        *("-m", "prune.repair.batches=1,2", "prune.warm_start.criterion=[taylor],[wanda]"),
        *("prompt=collaborative", "prompt.inference=false", "prompt.train=true,false", "--cfg", "job"),
    ]


def test_a_misspelled_option_below_an_older_name_is_told_under_the_new_one() -> None:
    with pytest.raises(UserError, match=r"no option 'prune\.repair\.batch'; did you mean 'prune\.repair\.batches'"):
        plain("prune.restore.batch=3")


@pytest.mark.parametrize(("group", "older", "newer"), FILES)
def test_a_users_yaml_with_older_names_composes_with_a_warning(
    group: str, older: str, newer: str, conf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (conf / group / "mine.yaml").write_text(older)
    made = plain(f"{group}=mine")
    distilled = "distill: 0.2" in older
    assert made == plain(newer, *(["prune.distill.logits=0.2"] if distilled else []))
    told = [record.message for record in caplog.records]
    assert len(told) == 1 + (distilled and group == "experiment")
    assert all(line.startswith(f"{group}/mine.yaml: ") for line in told)


def test_a_users_method_that_brings_the_prompt_along_still_does(conf: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The switches stand in another group now; what chooses a prompt outright still wins."""
    old = (
        (conf / "prune" / "compresso.yaml")
        .read_text()
        .replace("  - override /prompt@_global_.prompt: collaborative\n", "")
    )
    (conf / "prune" / "mine.yaml").write_text(old + "prompt:\n  train: true\n  inference: false\n")
    assert plain("prune=mine") == plain("prune=compresso", "prompt.inference=false")
    assert sum("mine.yaml" in record.message for record in caplog.records) == 2
    assert plain("prune=mine", "prompt.inference=true") == plain("prune=compresso")
    (conf / "experiment" / "mine.yaml").write_text(
        GLOBAL + "defaults: [override /prune: mine, override /prompt: task]\n"
    )
    assert plain("experiment=mine")["prompt"]["name"] == "task"


def test_an_old_experiment_that_sweeps_the_prompt(conf: Path) -> None:
    parameters = "hydra: {sweeper: {params: {prune.prompt.train: 'true,false', prune.restore.batches: '1,2'}}}\n"
    (conf / "experiment" / "mine.yaml").write_text(GLOBAL + "prune: {prompt: {inference: true}}\n" + parameters)
    assert plain("experiment=mine") == plain("prompt=collaborative")


def test_both_names_in_one_file_are_refused(conf: Path) -> None:
    (conf / "prune" / "mine.yaml").write_text("defaults: [exact]\nrestore: {batches: 3}\nrepair: {batches: 4}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: prune\.restore\.batches and prune\.repair\.batches"):
        plain("prune=mine")


def test_help_and_shipped_presets_have_new_names_alone() -> None:
    text = help_text() + "".join(path.read_text() for path in Path(config_dir()).rglob("*.yaml"))
    for old in moved.MOVED:
        assert old not in text
    assert "restore" not in text


OLD_OVERRIDES = ["experiment=smoke", "prune=compresso", "prune.restore.batches=2", "optim.distill=0.3"]


def old_run(path: Path) -> Path:
    """The directory of a run of before: older names and class paths, and options missing that came later."""
    settings = plain("experiment=smoke", "prune=compresso", "prune.repair.batches=2", "prune.distill.logits=0.3")
    settings.pop("run_dir")
    prune = settings["prune"]
    prune["restore"] = prune.pop("repair")
    prune["prompt"] = {"train": True, "inference": True, "text": None}
    prune["warm_start"]["criterion"] = "fisher"
    settings["prompt"] |= {"name": "none", "system": ""}
    settings["optim"]["distill"] = prune["distill"].pop("logits")
    prune["generator"]["_target_"] = "atp.generator.FreeLogits"
    prune["sampler"]["_target_"] = "atp.sampler.HardConcrete"
    prune["budget"]["_target_"] = "atp.objective.L0Lagrangian"
    for group, option in ((settings["export"], "public"), (prune, "budget_of"), (settings["evaluate"], "shared")):
        del group[option]
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"overrides": OLD_OVERRIDES, "config": settings}))
    return path


def test_an_old_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = old_run(tmp_path / "run")
    arguments = train._readable(train._with_resume([f"resume={path}"]))
    cfg = compose_config(arguments)
    assert cfg.prune.repair.batches == 2 and cfg.prune.distill.logits == 0.3 and cfg.prompt.name == "collaborative"
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    settings.pop("run_dir")
    caplog.clear()
    RunDirectory(path, settings, arguments, resume=True)
    (warning,) = (record.message for record in caplog.records)
    for name in ("prune.repair", "prune.distill.logits", "prompt"):
        assert f"is now {name}" in warning
    settings["prune"]["repair"]["batches"] = 3
    with pytest.raises(UserError, match=r"prune\.repair\.batches: was 2, now 3"):
        RunDirectory(path, settings, arguments, resume=True)


def test_an_old_run_is_exported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that its checkpoint is read with are the run's own; the export itself is tested elsewhere."""
    path = old_run(tmp_path / "run")
    (path / "metrics.json").write_text("{}")
    (path / "pruned").mkdir()
    (path / "pruned" / pipeline.PROVENANCE_FILE).write_text('{"run": {}}')
    read: list[TrainConfig] = []

    class Reached(Exception):
        pass

    def stages(config: TrainConfig, *_: Any) -> None:
        read.append(config)
        raise Reached

    monkeypatch.setattr(pipeline, "Stages", stages)
    with pytest.raises(Reached):
        pipeline.export_adapter(path, tmp_path / "out")
    (config,) = read
    assert config.prune.repair.batches == 2 and config.prune.distill.logits == 0.3 and not config.export.public
    assert config.prompt.name == "collaborative" and config.prompt.train and "made smaller" in config.prompt.system
    assert config.prune.warm_start.criterion == ["fisher"]
    assert class_path(config.prune.generator["_target_"]) == "atp.masks.generator.FreeLogits"
    check_start(config.prune)


def test_runs_of_before_and_of_now_are_compared_by_the_same_names(tmp_path: Path) -> None:
    old = old_run(tmp_path / "old")
    new = tmp_path / "new"
    new.mkdir()
    settings = plain("experiment=smoke", "prune=compresso", "prune.repair.batches=4", "prune.distill.logits=0.3")
    (new / "config.json").write_text(json.dumps({"overrides": [], "config": settings}))
    for path in (old, new):
        (path / "metrics.json").write_text(json.dumps(make_metrics()))
    runs, left_out = find_runs([old, new], moved.with_new_settings)
    assert not left_out
    varied = [key for key in varied_settings(runs) if key.startswith(("prune.", "prompt.", "optim."))]
    assert {key for key in varied if "_target_" not in key} == {"prune.repair.batches", "prune.budget_of"}
