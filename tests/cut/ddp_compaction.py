"""Two processes train, freeze, cut and go on together; each prints where it ended. Run by test_compaction."""

from __future__ import annotations

import json
import sys

import torch
from lightning import Trainer
from test_module import STEPS, make_data, make_module


def main(compaction: bool) -> None:
    """Fit on two processes and print a checksum of the adapters and the validation loss."""
    torch.manual_seed(0)
    module = make_module("exact", dropout=0.0, compaction=compaction)
    trainer = Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        devices=2,
        strategy="ddp_find_unused_parameters_true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=make_data())
    total = sum(float(p.detach().double().abs().sum()) for p in module.model.parameters() if p.requires_grad)
    end = {
        "rank": trainer.global_rank,
        "compact": bool(module.is_compact),
        "steps": trainer.global_step,
        "sum": total,
        "loss": float(trainer.callback_metrics["val/loss"]),
    }
    sys.stdout.write("\n" + json.dumps(end) + "\n")


if __name__ == "__main__":
    main(sys.argv[1] == "compact")
