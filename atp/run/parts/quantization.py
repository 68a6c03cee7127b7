"""A quantised base for training: which settings go with it, and how transformers is asked for it.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the frozen linears are stored in 4 bits (NF4 with double quantisation,
sections 3 and 3.1) or 8 bits (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339), adapters and generator stay in
float32. Only training reads the quantised weights. Removal, export and evaluation read the original ones again, so the
exported model holds no quantisation error but what the adapters have learnt to live with.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from atp.config.names import class_path
from atp.config.schema import ModelConfig, TrainConfig
from atp.errors import UserError

log = logging.getLogger(__name__)

QUANTIZATIONS = ("nf4", "int8")
_OF_WEIGHTS = ("taylor", "wanda", "fluctuation", "magnitude")
_OF_WEIGHTS_GENERATORS = ("atp.masks.generator.GradientScores",)


def check_quantization(config: TrainConfig) -> None:
    """Refuse what needs the weights that a quantised base has not, and warn of what is switched off.

    Raises:
        ValueError: An unknown kind, the package is missing, or a setting that needs the original weights in training.
    """
    kind, prune = config.model.quantization, config.prune
    if kind is None:
        return
    if kind not in QUANTIZATIONS:
        raise UserError(f"model.quantization is {kind!r}; known: {', '.join(QUANTIZATIONS)}, or null for none")
    if not is_installed():
        raise UserError(f"model.quantization={kind} needs bitsandbytes: pip install 'atp[quantization]'")
    own = f"model.quantization={kind}: while training there are no original weights"
    criteria = prune.warm_start.criterion
    told = f"[{', '.join(criteria)}]"
    if prune.warm_start.batches > 0 and {*"+".join(criteria).split("+")} & {*_OF_WEIGHTS}:
        raise UserError(
            f"{own} for prune.warm_start.criterion={told}; set it to [fisher], which needs the "
            "gradients of masks alone, or prune.warm_start.batches=0"
        )
    if prune.repair.batches > 0:
        raise UserError(f"{own} to repair (prune.repair.batches={prune.repair.batches}); set it to 0")
    several = len(criteria) > 1 or len(prune.warm_start.attention) > 1
    if prune.warm_start.batches > 0 and several:
        raise UserError(
            f"{own} to repair cuts by which prune.warm_start.criterion={told} or one of "
            f"prune.warm_start.attention={list(prune.warm_start.attention)} is chosen; set them to [fisher] and [0.0]"
        )
    if class_path(str(prune.generator.get("_target_"))) in _OF_WEIGHTS_GENERATORS:
        raise UserError(f"{own} for the generator {prune.generator['_target_']}; choose prune/generator=free")
    for name, asked in (("prune.compact", prune.compact), ("prune.progressive.cuts", prune.progressive.cuts > 0)):
        if asked:
            log.warning("%s is ignored: model.quantization=%s packs weights, which are not cut in place", name, kind)


def is_installed() -> bool:
    """Whether bitsandbytes is there."""
    return importlib.util.find_spec("bitsandbytes") is not None


def bitsandbytes_settings(config: ModelConfig, compute_dtype: torch.dtype) -> Any:
    """What transformers' ``from_pretrained`` takes as ``quantization_config``."""
    from transformers import BitsAndBytesConfig

    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
