"""The command line: help, mistakes named with the nearest valid key, resume arguments; and every YAML of conf/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atp.commands.train import _with_resume, compose_config, is_expected, main
from atp.config.schema import TrainConfig, config_dir
from atp.errors import UserError
from atp.run.directory import CONFIG, RunDirectory, find_run

ROOT = Path(config_dir())
GROUP_FILES = sorted(p for p in ROOT.rglob("*.yaml") if p.parent != ROOT)


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_composes_and_validates(path: Path) -> None:
    if path.stem == "optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra 'sweep'")
    group, choice = path.parent.relative_to(ROOT).as_posix(), path.stem
    cfg = compose_config([f"{group}={choice}"])
    assert isinstance(OmegaConf.to_object(cfg), TrainConfig)


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_opens_with_what_it_is(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("# ") and "@package" not in line for line in lines[:2])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.sparsty=0.3"], r"command line: there is no option 'prune\.sparsty'; did you mean 'prune\.sparsity'"),
        (["prune.schedule.freez=0.3"], r"did you mean 'prune\.schedule\.freeze_at'"),
        (["trainer.max_step=3"], r"did you mean 'trainer\.max_steps'"),
        (["experiment=legal_50pc"], r"there is no experiment=legal_50pc; did you mean 'legal_50pct'"),
        (["model=lama2_7b"], r"did you mean 'llama2_7b'"),
        (["prune/sampler=gumbel"], r"did you mean 'gumbel_sigmoid'"),
        (["prune.sparsity=half"], r"prune\.sparsity: Value 'half'.*Float"),
        (["lora.r=[1,2]"], r"lora\.r"),
    ],
)
def test_mistakes_name_the_nearest_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config(overrides)


def test_typo_in_a_yaml_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    tree = tmp_path / "conf"
    shutil.copytree(ROOT, tree)
    (tree / "experiment" / "mine.yaml").write_text("# @package _global_\n# Mine.\nprune:\n  sparsty: 0.3\n")
    monkeypatch.setattr("atp.commands.train.config_dir", lambda: str(tree))
    with pytest.raises(
        ValueError, match=r"conf/experiment/mine\.yaml: there is no option 'prune\.sparsty'; did you mean"
    ):
        compose_config(["experiment=mine"])


def test_main_reports_a_mistake_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["experiment=legal_50pct", "prune.sparsty=0.3"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "prune.sparsity" in error and "Traceback" not in error


def test_help_explains_every_group_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for path in GROUP_FILES:
        assert path.stem in text
    for option in ("prune.sparsity", "prune.schedule.freeze_at", "lora.r", "trainer.max_steps", "resume"):
        assert option in text


def test_sweep_overrides_are_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["-m", "prune.sparsty=0.3,0.4"])
    assert "did you mean 'prune.sparsity'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume=nowhere"], "not a run directory"),
        (["resume=last"], "there is no run under"),
        (["-m", "resume=last"], "leave out -m"),
    ],
)
def test_bad_resume(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_run_directory_refuses_to_be_overwritten(tmp_path: Path) -> None:
    config = {"seed": 0, "prune": {"sparsity": 0.5}, "logger": {}}
    RunDirectory(tmp_path / "a", config, ["seed=0"], resume=False)
    with pytest.raises(ValueError, match=r"already holds an unfinished run.*resume="):
        RunDirectory(tmp_path / "a", config, [], resume=False)
    with pytest.raises(ValueError, match=r"prune\.sparsity: was 0\.5, now 0\.3"):
        RunDirectory(tmp_path / "a", {**config, "prune": {"sparsity": 0.3}}, [], resume=True)
    RunDirectory(tmp_path / "a", {**config, "logger": {"wandb": {}}}, [], resume=True)
    (tmp_path / "a" / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a finished run; choose another run_dir"):
        RunDirectory(tmp_path / "a", config, [], resume=False)


def test_an_unfinished_run_goes_on_with_other_exports(tmp_path: Path) -> None:
    """What was made with the old settings is made again, the training is kept, and the configuration stays true."""
    path = tmp_path / "a"
    config = {"seed": 0, "export": {"gguf": ["f16"]}, "evaluate": {"speed_repeats": 5}}
    directory = RunDirectory(path, config, ["seed=0"], resume=False)
    for name in ("fit", "dense", "export", "pruned", "cost"):
        directory.stage(name, lambda: {"seconds": 1.0})
    RunDirectory(path, {**config, "evaluate": {"speed_repeats": 9}}, ["seed=0"], resume=True)
    assert {file.stem for file in (path / "stages").iterdir()} == {"fit", "dense", "export", "pruned"}
    other = {**config, "export": {"gguf": []}, "evaluate": {"speed_repeats": 9}}
    RunDirectory(path, other, ["seed=0", "export.gguf=[]"], resume=True)
    assert {file.stem for file in (path / "stages").iterdir()} == {"fit", "dense"}
    assert json.loads((path / CONFIG).read_text()) == {"overrides": ["seed=0", "export.gguf=[]"], "config": other}
    with pytest.raises(ValueError, match="seed: was 0, now 1"):
        RunDirectory(path, {**config, "seed": 1}, [], resume=True)
    directory.write_metrics({})
    with pytest.raises(ValueError, match=r"export\.gguf.*python -m atp\.export"):
        RunDirectory(path, config, [], resume=True)


def test_resume_with_other_exports_keeps_the_runs_own_overrides(tmp_path: Path) -> None:
    saved = ["experiment=smoke", "seed=3", "export.gguf=[q99]"]
    (tmp_path / CONFIG).write_text(json.dumps({"overrides": saved, "config": {}}))
    arguments = _with_resume([f"resume={tmp_path}", "export.gguf=[]"])
    assert arguments[:3] == ["experiment=smoke", "seed=3", "export.gguf=[]"]


def test_stages_run_once(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a", {}, [], resume=False)
    calls: list[int] = []

    def work() -> dict[str, int]:
        calls.append(1)
        return {"value": 7}

    assert directory.stage("x", work) == directory.stage("x", work) == {"value": 7}
    assert calls == [1]

    def fails() -> dict[str, int]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        directory.stage("y", fails)
    assert not (directory.path / "stages" / "y.json").exists()


def test_newest_run_is_the_last(tmp_path: Path) -> None:
    import os

    for age, name in enumerate(("c", "a", "b")):
        path = tmp_path / "runs" / "mine" / name / CONFIG
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"overrides": [], "config": {}}))
        os.utime(path, (1000 - age, 1000 - age))
    assert find_run("last", "mine", tmp_path / "runs").name == "c"
    assert find_run("last", None, tmp_path / "runs").name == "c"


def test_only_what_is_the_users_to_mend_loses_its_traceback() -> None:
    def ours() -> None:
        exec(compile("[1].index(2)", "atp/bug.py", "exec"), {"__name__": "atp.bug"})

    with pytest.raises(ValueError) as bug:
        ours()
    with pytest.raises(UserError) as mistake:
        compose_config(["prune.sparsty=0.5"])
    assert not is_expected(bug.value)
    assert is_expected(mistake.value)
