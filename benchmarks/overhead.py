"""What logging costs: ``python -m benchmarks.overhead [--steps 700] [--rounds 2]``; eight minutes on two cores.

Two processes train the embedded model from equal seeds, one with everything logged (CSV, wandb offline, scalars, mask
pictures as images and data, progress lines), one with nothing logged at all. They take turns of a few steps, so that
both see the same machine, and each adds up its own seconds from before the first step to after the last. Printed is
the ratio of the sums with a 95% bootstrap interval over the turns; per turn, per round and the seconds for opening and
closing the loggers stand in ``benchmarks/results/overhead.json``. The aim is at most 1.02.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from atp.commands.train import compose_config
from atp.config.schema import TrainConfig
from atp.run import parts
from atp.train.joint import PruningModule
from atp.train.loggers import close_loggers, csv_logger
from atp.train.monitoring import MaskMonitor, TrainingHealth
from atp.train.progress import ProgressReport, QuietCollector, Throughput

TURN = 10  # steps
OUT = Path(__file__).parent / "results" / "overhead.json"


class Turns(Callback):
    """Ends a turn every few steps, at a step's start, when all of the step before it is written.

    Args:
        connection: Told what each turn took; gives the word to go on.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.since = self.cpu_since = 0.0

    def wait(self) -> None:
        """Begin a turn when it comes."""
        self.connection.recv()
        self.since, self.cpu_since = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Tell what the turn took, on the clock and of the processor."""
        self.connection.send((time.perf_counter() - self.since, time.process_time() - self.cpu_since))
        self.wait()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End the turn when its steps are done."""
        if trainer.global_step and trainer.global_step % TURN == 0:
            self.end()


def open_logging(config: TrainConfig, folder: Path) -> tuple[list[Callback], list[Logger]]:
    """Everything that a run logs with, as its stages do."""
    callbacks = [MaskMonitor(folder, folder / "mask_history.jsonl"), Throughput(), TrainingHealth()]
    loggers = [csv_logger(folder / "csv"), *parts.make_loggers(config, folder)]
    for logger in loggers:
        assert logger.experiment
    return [*callbacks, ProgressReport("joint")], loggers


def silence(module: PruningModule) -> None:
    """Take the module's own logging away as well."""
    module.log = module.log_dict = module.log_figures = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    module._log_masks = lambda *_: None  # type: ignore[method-assign]


def train(connection: Connection, folder: Path, logged: bool, steps: int, seed: int, threads: int) -> None:
    """One fit in turns, in a process of its own: the default legal run."""
    torch.set_num_threads(threads)
    overrides = ["experiment=legal_50pct", "logger=wandb", f"trainer.max_steps={steps}"]
    config: Any = OmegaConf.to_object(compose_config(overrides))
    seed_everything(seed, workers=True, verbose=False)
    base = parts.load_base(config.model)
    splits = parts.load_splits(config.data, config.seed)
    data = parts.data_module(config, splits, parts.load_tokenizer(config.model), base.config.max_position_embeddings)
    data.setup("fit")
    module = parts.pruning_module(config, base)
    started = time.perf_counter()
    if logged:
        callbacks, loggers = open_logging(config, folder)
    else:
        callbacks, loggers = [], []
        silence(module)
    opening_s = time.perf_counter() - started
    connection.send("ready")
    turns = Turns(connection)
    trainer = parts.make_trainer(config, [turns, QuietCollector(), *callbacks], loggers, data.num_batches)
    turns.wait()
    trainer.fit(module, datamodule=data)
    turns.end()
    started = time.perf_counter()
    close_loggers(loggers)
    connection.send({"opening_s": opening_s, "closing_s": time.perf_counter() - started})


def measure_round(folder: Path, steps: int, seed: int, threads: int) -> dict[str, Any]:
    """Seconds of every turn of a logged and of a bare run, in alternation; who begins alternates too."""
    context = multiprocessing.get_context("spawn")
    ends: dict[bool, Connection] = {}
    workers = []
    for logged in (True, False):
        ends[logged], theirs = context.Pipe()
        arguments = (theirs, folder / str(logged), logged, steps, seed, threads)
        workers.append(context.Process(target=train, args=arguments, daemon=True))
        workers[-1].start()
        theirs.close()
        assert ends[logged].recv() == "ready"
    seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for turn in range(-(-steps // TURN)):
        for logged in (True, False) if (turn + seed) % 2 else (False, True):
            ends[logged].send("go")
            seconds[logged].append(ends[logged].recv())
    extra: dict[bool, dict[str, float]] = {}
    for logged in (True, False):
        ends[logged].send("go")
        extra[logged] = ends[logged].recv()
    for worker in workers:
        worker.join()
    clocks = {"s": 0, "cpu_s": 1}
    times = {
        f"{name}_{clock}": [round(pair[index], 4) for pair in seconds[logged]]
        for clock, index in clocks.items()
        for name, logged in (("logged", True), ("bare", False))
    }
    return {**times, **extra[True]}


def interval(logged_s: list[float], bare_s: list[float], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the ratio of sums over pairs of turns."""
    chosen = random.Random(0)
    pairs = list(zip(logged_s, bare_s, strict=True))
    ratios = []
    for _ in range(draws):
        drawn = chosen.choices(pairs, k=len(pairs))
        ratios.append(sum(pair[0] for pair in drawn) / sum(pair[1] for pair in drawn))
    ratios.sort()
    return ratios[round(0.025 * draws)], ratios[round(0.975 * draws) - 1]


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="pairs of runs")
    parser.add_argument("--steps", type=int, default=700, help="optimiser steps of a run")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file")
    options = parser.parse_args()
    os.environ |= {"WANDB_MODE": "offline", "OMP_WAIT_POLICY": "passive"}  # who waits for its turn takes no core
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for number in range(options.rounds):
            rounds.append(measure_round(Path(root) / str(number), options.steps, number, options.threads))
            logged_s, bare_s = sum(rounds[-1]["logged_s"]), sum(rounds[-1]["bare_s"])
            print(f"round {number}: {bare_s:.1f} s bare, {logged_s:.1f} s logged: {logged_s / bare_s:.4f}", flush=True)
    result: dict[str, Any] = {"aim": 1.02, "steps": options.steps, "turn_steps": TURN, "threads": options.threads}
    for clock, told in (("s", "training time"), ("cpu_s", "processor time of the training process")):
        logged, bare = (
            [value for found in rounds for value in found[f"{kind}_{clock}"]] for kind in ("logged", "bare")
        )
        ratio, (low, high) = sum(logged) / sum(bare), interval(logged, bare)
        result[f"ratio_{clock}"], result[f"interval_95_{clock}"] = round(ratio, 5), [round(low, 5), round(high, 5)]
        print(f"{told} with everything logged: {ratio:.4f} of bare, 95% interval {low:.4f} to {high:.4f}")
    for what in ("opening_s", "closing_s"):
        result[what] = [round(found[what], 2) for found in rounds]
    print(f"once per run besides, opening and closing the loggers: {result['opening_s']}, {result['closing_s']} s")
    options.out.write_text(json.dumps({**result, "rounds": rounds}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
