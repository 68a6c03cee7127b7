"""The command line: ``python train.py`` and ``atp-train``.

Turns arguments into a checked, typed configuration and hands it to the pipeline. Before Hydra runs, this file answers
``--help`` from the schema, resolves ``resume=``, and composes the configuration once so that a mistake fails at once
with the file, the key and the nearest valid key. It knows Hydra's command line, and nothing of what a
run does.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, OverrideParseException, SearchPathException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from atp.commands.explaining import explain
from atp.commands.overrides import of_first_job, swept
from atp.commands.terminal import steady
from atp.commands.where import Place
from atp.config.help import help_text
from atp.config.moved import with_new_overrides
from atp.config.quoting import assigned, corrected, key_of, readable, sweeps, text_of, three_ways
from atp.config.schema import TrainConfig, config_dir, register_schema
from atp.config.sources import install
from atp.errors import UserError
from atp.imports import uncollected, without_plots
from atp.run import sweep
from atp.run.directory import find_run, saved_overrides
from atp.run.lock import InUse, hold

log = logging.getLogger(__name__)

FAILED = 1
USER_ERROR = 2
_MAPPINGS = ("data.fields", "data.tasks", "data.path", "evaluate.path")
INTERRUPTED = 130
_ONLY_SHOWS = ("cfg", "info", "help", "hydra_help", "shell_completion")  # flags of Hydra's that run nothing


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Args:
        argv: Arguments without the program name; the process' own when None.

    Raises:
        SystemExit: With 2 after a user's mistake, 130 after an interruption, 1 after any other failure, also of a
            sweep's job.
    """
    steady()
    register_schema()
    install()
    without_plots()
    given = arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(help_text())
        return
    checks_data = "--check" in arguments
    with ExitStack() as held:
        try:
            arguments = _readable(_with_resume([a for a in arguments if a != "--check"]))
            place = _check(arguments)
            if checks_data:
                raise SystemExit(_check_data(arguments))
            if place is not None:
                arguments = place.prepare(arguments, held)
        except UserError as error:
            sys.stderr.write("\n  ".join([f"error: {error}", *_ways_out(error, given)]) + "\n")
            raise SystemExit(USER_ERROR) from None
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        sys.argv = [sys.argv[0], *arguments]
        SweepCallback.failed_jobs = 0
        try:
            hydra.main(version_base="1.3", config_path=config_dir(), config_name="train")(_job)()
        except (
            ConfigCompositionException,
            OverrideParseException,
            SearchPathException,
        ) as error:  # in Hydra's own settings
            sys.stderr.write(f"error: {explain(error)}\n")
            raise SystemExit(USER_ERROR) from None
    if SweepCallback.failed_jobs:
        raise SystemExit(FAILED)


class AmbiguousOverride(UserError):
    """A value with commas outside a sweep."""

    def __init__(self, override: str) -> None:
        super().__init__(f"{override}: a value with commas may be a text, a list or a sweep; write one of")
        self.override = override


def _ways_out(error: UserError, given: Sequence[str]) -> list[str]:
    """Command lines that Hydra can read, below its complaint."""
    if isinstance(error, AmbiguousOverride):
        return three_ways(given, error.override)
    better = corrected(given) if isinstance(error.__cause__, OverrideParseException) else None
    return ["write the value in quotes, and those in the shell's own:", better] if better else []


def _job(cfg: DictConfig) -> float | None:
    """One Hydra job: run the pipeline, turn its complaints into messages and exit codes."""
    with uncollected():
        from atp.run.agreement import NotVerified
        from atp.run.directory import RunInterrupted
        from atp.run.pipeline import run

    run_dir = Path(HydraConfig.get().runtime.output_dir)
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith(("resume=", "run_dir="))]
    try:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            return _sweep_job(cfg, run_dir, overrides)
        return run(cfg, run_dir, overrides=overrides)
    except RunInterrupted as interruption:
        log.warning("%s", interruption)
        raise SystemExit(INTERRUPTED) from None
    except NotVerified as fault:
        log.error("%s", fault)
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        log.warning("interrupted; go on with: python train.py resume=%s", run_dir)
        raise SystemExit(INTERRUPTED) from None
    except (ValueError, OSError, RuntimeError) as error:
        if not is_expected(error):
            raise
        log.error("%s", error)
        raise SystemExit(USER_ERROR) from None


def _sweep_job(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """One job of a sweep: skipped if finished, continued if it was interrupted; a failure is noted, not raised."""
    import torch

    from atp.run.pipeline import run
    from atp.train.trials import TrialStopped

    job = sweep.read_job(run_dir)
    if job.state == "stopped":
        log.info("%s was stopped as a bad trial (%s); skipped", run_dir, job.reason)
        return None
    if cfg.trainer.accelerator != "cpu":
        sweep.lease_gpu(run_dir.parent, torch.cuda.device_count())
    try:
        with hold(run_dir):
            sweep.clear_mark(run_dir)
            return run(cfg, run_dir, overrides=overrides, go_on=True)
    except InUse as busy:
        log.warning("%s; this sweep leaves it out", busy)
        return None
    except TrialStopped as stop:
        log.info("%s: stopped: %s", run_dir.name, stop)
        sweep.mark_job(run_dir, "stopped", str(stop))
        return stop.value if str(cfg.optimized_metric).endswith("perplexity") else None
    except Exception as error:
        log.error("%s: %s", run_dir.name, error, exc_info=not is_expected(error))
        sweep.mark_job(run_dir, "failed", f"{type(error).__name__}: {error}")
        return None


class SweepCallback(Callback):
    """Hydra calls this when a sweep begins and ends, on the machine that started it."""

    failed_jobs = 0

    def __init__(self) -> None:
        self._started = 0.0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make or reopen the sweep's folder."""
        self._started = time.time()
        sweep.start_sweep(Path(config.hydra.sweep.dir), list(config.hydra.overrides.task))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print how the jobs ended, failed ones with their reason."""
        folder = Path(config.hydra.sweep.dir)
        jobs = sweep.read_jobs(folder)
        SweepCallback.failed_jobs = sum(job.state == "failed" and job.time >= self._started for job in jobs)
        for line in sweep.summary_lines(folder, jobs):
            sys.stdout.write(line + "\n")


def is_expected(error: BaseException) -> bool:
    """Whether an error is the user's to mend or the machine's; any other is a fault of ours and shows its traceback."""
    from atp.run.agreement import NotVerified
    from atp.train.tuning import TrainingDiverged

    return isinstance(error, (UserError, TrainingDiverged, NotVerified, OSError))


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration outside a Hydra job, for notebooks, tests and checks.

    Raises:
        ValueError: What is wrong, where, and the nearest valid name.
    """
    register_schema()
    install()
    cfg = _composed(_readable(overrides))
    _without_hydra(cfg)
    return cfg


def _without_hydra(cfg: DictConfig) -> None:
    """Take Hydra's own settings out."""
    with open_dict(cfg):
        del cfg["hydra"]


def _composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration with Hydra's own settings under ``hydra``."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir(), version_base="1.3"):
            cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    return cfg


def _parse(arguments: Sequence[str]) -> Any:
    return get_args_parser().parse_args(list(arguments))


def _check(arguments: Sequence[str]) -> Place | None:
    """Compose once and complain clearly; in a sweep each swept override stands with its first value.

    Returns:
        Where Hydra will write; None where it only shows something, or reads a configuration of the user's own.
    """
    parsed = _parse(arguments)
    if parsed.config_name or parsed.config_dir or parsed.config_path:
        return None
    first = of_first_job(parsed.overrides)
    cfg = _composed(first)
    is_sweep = sweeps(arguments) or cfg.hydra.mode is RunMode.MULTIRUN
    folder = Path(cfg.hydra.sweep.dir if is_sweep else cfg.hydra.run.dir)
    _without_hydra(cfg)
    several = swept(parsed.overrides)
    if several and not is_sweep:
        raise AmbiguousOverride(several[0])
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise UserError(f"{sorted(missing)[0]} is not set; add {sorted(missing)[0]}=<value>")
    _check_settings(cfg)
    if any(getattr(parsed, name, False) for name in _ONLY_SHOWS):
        return None
    setting = "hydra.sweep.dir" if is_sweep else "hydra.run.dir"
    own = next((text for text in reversed(parsed.overrides) if key_of(text) == setting), None)
    if own is not None:
        return Place(Path(text_of(own.partition("=")[2])), setting, is_sweep)
    return Place(folder, setting if is_sweep else "run_dir", is_sweep)


def _check_settings(cfg: DictConfig) -> None:
    """Refuse what no machine takes, before anything is written."""
    with uncollected():
        from atp.run.checks import check_values
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    check_values(config)


def _prompt_of(arguments: Sequence[str]) -> str:
    """Name of the prompt that arguments come to."""
    parsed = _parse(arguments)
    own = [f"hydra.searchpath=['{Path(parsed.config_dir).resolve()}']"] if parsed.config_dir else []
    return str(compose_config([*of_first_job(parsed.overrides), *own]).prompt.name)


def _check_data(overrides: Sequence[str]) -> int:
    """``--check``: show what a model would see of the data, train nothing; 2 if any row is bad."""
    from atp.run.pipeline import check_data

    return USER_ERROR if check_data(compose_config(overrides)) else 0


def _readable(arguments: Sequence[str]) -> list[str]:
    """Arguments for Hydra: older names replaced, ``prompt=<file>`` as its group has it, open mappings take new keys."""
    presets = {path.stem for path in (Path(config_dir()) / "prompt").glob("*.yaml")}
    found: list[str] = []
    for argument in with_new_overrides(readable(arguments), _prompt_of):
        key, _, value = argument.partition("=")
        chosen = value.strip("'\"")
        if key == "prompt.instructions" and value:
            found.append(f"++{argument}")
        elif key in _MAPPINGS and value.startswith("{"):  # replaces what a preset has, where Hydra would merge
            found += [f"{key}=null", f"++{argument}"]
        elif key != "prompt" or chosen in presets or "," in chosen:
            found.append(argument)
        elif Path(chosen).expanduser().is_file():
            found += ["prompt=file", assigned("prompt.path", str(Path(chosen).expanduser().resolve()))]
        elif "/" in chosen or "." in chosen:
            raise UserError(f"prompt={chosen}: there is no such file; give one, or {', '.join(sorted(presets))}")
        else:
            found.append(argument)
    return found


def _with_resume(arguments: list[str]) -> list[str]:
    """Replace ``resume=last`` by its directory; a ``resume=`` with at most exports changed gets the run's overrides."""
    resume = next((a for a in arguments if a.startswith("resume=") and a not in ("resume=null", "resume=")), None)
    if resume is None:
        return arguments
    others = [a for a in arguments if a is not resume]
    if any(a in ("-m", "--multirun") for a in others):
        raise UserError("resume goes on with one run; leave out -m")
    given = {key_of(a) for a in others}
    is_own = all(key.startswith(("export", "evaluate")) for key in given)
    name = None if is_own else compose_config(others).name
    run_dir = find_run(text_of(resume.removeprefix("resume=")), name)
    if is_own:
        others = [a for a in saved_overrides(run_dir) if key_of(a) not in given] + others
    return [*others, assigned("resume", str(run_dir)), assigned("run_dir", str(run_dir))]
