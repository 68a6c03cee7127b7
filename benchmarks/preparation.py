"""What a run does before its first step, as one pass and as separate ones: ``python -m benchmarks.preparation``.

Options: ``--batches 4 --steps 100 --ways separate,shared experiment=legal_50pct [overrides]``.

Two ways of the same work, one after the other in one process, timed by the processor's clock so that what else the
machine does counts little. ``separate`` is what runs did at first: a pass for every criterion, one for the moments
by which candidates are repaired, every candidate's cut fitted by a system of its own and run in the masked model over
all batches, and a pass for the moments of the chosen cut. ``shared`` is :func:`atp.prepare.starts.starting_scores` as
it is. Both choose a start among the configuration's candidates and repair its cut by least squares. For the share of a
run, a plain LoRA step of the same model and batches is timed too: a run trains the pruned model and dense + LoRA for
``--steps`` each, the pruned one taken for as slow as the dense one, which it is only until it is cut.

Written: ``benchmarks/results/preparation_<name of the configuration>.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning import seed_everything
from omegaconf import OmegaConf
from torch import Tensor

from atp.commands.train import compose_config
from atp.config.schema import TrainConfig
from atp.masks.lora import MaskedModel, trainable_parameters
from atp.masks.loss import causal_loss
from atp.prepare import comparison
from atp.prepare.criteria import importances, rank
from atp.prepare.least_squares import OutputFits, output_moments, repair_outputs
from atp.prepare.passes import observe
from atp.prepare.starts import COMPARED, Start, candidates, starting_scores
from atp.run import parts
from atp.train.joint import PruningModule

RESULTS = Path(__file__).parent / "results"
Batches = Sequence[Mapping[str, Tensor]]


class Clock:
    """Processor seconds by part.

    Attributes:
        seconds: Seconds so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block under ``with`` to a part."""
        started = time.process_time()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.process_time() - started, 2)


def shared(module: PruningModule, batches: Batches, config: TrainConfig, clock: Clock) -> Start:
    """Choose and repair as runs do."""
    settings = config.prune.warm_start
    start = starting_scores(
        module.masked,
        batches,
        module.selected,
        criteria=settings.criterion,
        ranking=settings.ranking,
        gain=settings.gain,
        attention=settings.attention,
        ridge=config.prune.repair.ridge,
        seed=config.seed,
        moments=len(batches),
        part=clock.part,
    )
    with clock.part("reconstruction"):
        fits = start.fits if start.fits_of == len(batches) else None
        repair_outputs(module.masked, module.selected(start.scores_U), lambda: batches, fits=fits)
    return start


def separate(module: PruningModule, batches: Batches, config: TrainConfig, clock: Clock) -> Start:
    """Choose and repair with nothing shared."""
    settings, masked = config.prune.warm_start, module.masked
    single = dict.fromkeys(one for name in settings.criterion for one in name.split("+"))
    with clock.part("importance"):
        for one in single:
            importances([one], masked, batches, config.seed)
    measured = importances(settings.criterion, masked, batches, config.seed)  # not timed: joins what was measured
    found = candidates(
        masked.space,
        {name: settings.gain * rank(settings.ranking, masked.space, value) for name, value in measured.items()},
        settings.attention,
    )
    with clock.part("choice"), mock.patch.object(comparison, "_LARGEST_CUT_BYTES", 0):
        some = batches[:COMPARED]
        fits = OutputFits(_moments(masked, some), config.prune.repair.ridge)
        chosen = comparison.repaired_losses(masked, found, module.selected, causal_loss, some, fits=fits, halving=False)
    with clock.part("reconstruction"):
        repair_outputs(masked, module.selected(found[chosen.best]), lambda: batches)
    return Start(chosen.best, found[chosen.best], chosen.losses, chosen.batches)


def _moments(masked: MaskedModel, batches: Batches) -> dict[str, Tensor]:
    moments = output_moments(masked)
    if moments is None:
        raise SystemExit("the moments of this model are too large to keep; name a smaller one")
    observe(masked, batches, [moments])
    return moments.checked()


def lora_step(masked: MaskedModel, batches: Batches) -> float:
    """Processor seconds of a plain LoRA step: forward, backward and AdamW, the mean of all batches but the first."""
    optimizer = torch.optim.AdamW(list(trainable_parameters(masked).values()), lr=1e-4)
    masked.train()
    masked.set_masks(None)
    seconds = []
    for batch in batches:
        started = time.process_time()
        optimizer.zero_grad()
        loss: Any = causal_loss(masked, batch)
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - started)
    return sum(seconds[1:]) / max(len(seconds) - 1, 1) if len(seconds) > 1 else seconds[0]


WAYS: dict[str, Callable[[PruningModule, Batches, TrainConfig, Clock], Start]] = {
    "separate": separate,
    "shared": shared,
}


def measure(config: TrainConfig, ways: Sequence[str], number: int, steps: int) -> dict[str, Any]:
    """Time the ways, each on the base model loaded anew; seconds by part, what was chosen, and shares of a run."""
    tokenizer = parts.load_tokenizer(config.model)
    prompt = parts.load_prompt(config, tokenizer)
    splits = prompt.on_splits(parts.load_splits(config.data, config.seed, tokenizer), tokenizer)
    base = parts.load_base(config.model)
    data = parts.data_module(config, splits, tokenizer, base.config.max_position_embeddings)
    data.setup("fit")
    batches: list[dict[str, Tensor]] = list(data.calibration_dataloader(number))
    found: dict[str, Any] = {"batches": len(batches), "tokens": int(sum(b["attention_mask"].sum() for b in batches))}
    found["steps"], found["ways"] = steps, {}
    for name in ways:
        seed_everything(config.seed, verbose=False)
        module, clock = parts.pruning_module(config, parts.load_base(config.model)), Clock()
        start = WAYS[name](module, batches, config, clock)
        found["ways"][name] = {
            "seconds": clock.seconds,
            "chosen": start.name,
            "losses": start.losses,
            "batches": start.batches,
        }
        print(name, clock.seconds, start.name, flush=True)
    found["lora_step"] = round(lora_step(module.masked, batches[:3]), 3)
    for way in found["ways"].values():
        before = sum(way["seconds"].values())
        way["share"] = round(before / (before + 2 * steps * found["lora_step"]), 3)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=16, help="calibration batches for choice and repair")
    parser.add_argument("--steps", type=int, default=100, help="steps of the run that a share is of")
    parser.add_argument("--ways", default="separate,shared", help=f"of {', '.join(WAYS)}")
    parser.add_argument("overrides", nargs="*", help="the configuration, as of train.py")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config: Any = OmegaConf.to_object(compose_config(options.overrides))
    found = measure(config, options.ways.split(","), options.batches, options.steps)
    print(json.dumps({**found, "ways": {name: way["share"] for name, way in found["ways"].items()}}))
    file = RESULTS / f"preparation_{config.name}.json"
    file.write_text(json.dumps({"overrides": options.overrides, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
