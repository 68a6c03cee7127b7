"""What logging costs: ``python -m benchmarks.overhead [--rounds 5] [--steps 200]``; needs an otherwise idle machine.

Trains the embedded model with everything logged (CSV, wandb offline, mask pictures as images and data) and with nothing
but the loss, in alternation in one process, from equal seeds. Prints the median over rounds of the ratio of training
times, with the smallest and largest, and writes ``benchmarks/overhead.json``. The aim is at most 2% above 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from atp import build
from atp.callbacks import ProgressReport, Throughput
from atp.cli import compose_config
from atp.config import TrainConfig
from atp.loggers import close_loggers, csv_logger
from atp.monitoring import MaskMonitor, TrainingHealth


def train_seconds(config: TrainConfig, folder: Path, logged: bool) -> float:
    """Seconds of one fit, from the first step to the last."""
    base = build.load_base(config.model)
    splits = build.load_splits(config.data, config.seed)
    context = base.config.max_position_embeddings
    data = build.data_module(config, splits, build.load_tokenizer(config.model), context)
    module = build.pruning_module(config, base)
    callbacks: list[Any] = []
    loggers: list[Any] = []
    if logged:
        callbacks = [MaskMonitor(folder, folder / "mask_history.jsonl"), Throughput(), TrainingHealth()]
        callbacks.append(ProgressReport("joint"))
        loggers = [csv_logger(folder / "csv"), *build.make_loggers(config, folder)]
    trainer = build.make_trainer(config, callbacks, loggers, data.num_batches)
    started = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - started
    close_loggers(loggers)
    return seconds


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/overhead.json"))
    options = parser.parse_args()
    os.environ["WANDB_MODE"] = "offline"
    overrides = ["experiment=legal_50pct", "logger=wandb", f"trainer.max_steps={options.steps}", "prune=l0"]
    cfg: Any = compose_config(overrides)
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    ratios, pairs = [], []
    with tempfile.TemporaryDirectory() as root:
        train_seconds(config, Path(root) / "warm", logged=False)
        for number in range(options.rounds):
            seconds = {}
            for logged in (True, False) if number % 2 else (False, True):
                torch.manual_seed(number)
                seconds[logged] = train_seconds(config, Path(root) / f"{number}_{logged}", logged)
            pairs.append({"logged_s": seconds[True], "bare_s": seconds[False]})
            ratios.append(seconds[True] / seconds[False])
            print(f"round {number}: {seconds[False]:.1f} s bare, {seconds[True]:.1f} s logged: {ratios[-1]:.4f}")
    result = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "pairs": pairs}
    options.out.write_text(json.dumps({**result, "steps": options.steps, "threads": torch.get_num_threads()}, indent=2))
    print(
        f"training time with everything logged: {result['median']:.4f} of bare [{min(ratios):.4f}, {max(ratios):.4f}]"
    )


if __name__ == "__main__":
    main()
