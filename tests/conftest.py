"""Tiny random models of every shape that matters, and what keeps tests that run side by side apart.

pytest-xdist starts two or more workers (``addopts`` in pyproject.toml); each has caches of its own, one thread, and
temporary folders of its own. ``pytest -n 0`` runs everything in one process. Nothing here touches the network.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from atp.model.families import ALWAYS, FAMILIES

if TYPE_CHECKING:  # the process that only hands tests to the workers starts without them
    import torch
    from transformers import PreTrainedModel

_caches = tempfile.mkdtemp(prefix="atp-test-cache-")  # this process's own
atexit.register(shutil.rmtree, _caches, ignore_errors=True)
os.environ |= {
    "ATP_CACHE": _caches,
    "HF_MODULES_CACHE": f"{_caches}/modules",  # before transformers, which reads it once, as HF_HUB_OFFLINE
    "TORCHINDUCTOR_CACHE_DIR": f"{_caches}/inductor",
    "OMP_NUM_THREADS": "1",  # before torch; the models here are so small that threads only wait for each other
}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

ATTENTION = {"mha": 6, "gqa": 3, "mqa": 1}
QUIRKS: dict[str, dict[str, object]] = {
    "gemma2": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        },
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.7,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
}
"""What makes a family's tiny model other than a Llama; lists have an entry for each layer."""
FOR_LLAMA_CPP: dict[str, dict[str, object]] = {
    "smollm3": {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
}
"""What llama.cpp fixes for a family, where its quirks are others."""


def tiny_model(
    family: str = "llama",
    attention: str = "gqa",
    *,
    tied: bool = False,
    biased: bool = False,
    layers: int = 2,
    seed: int = 0,
    vocabulary: int = 64,
    for_llama_cpp: bool = False,
) -> PreTrainedModel:
    """A random model: hidden 48, 6 query heads of 8, 20 channels, vocabulary 64, context 64."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    biases = {name: biased for name in set(FAMILIES[family].biases.values()) - {ALWAYS}}
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=ATTENTION[attention],
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **biases,
        **quirks(family, layers, for_llama_cpp),
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases start at zero and norms at one, which would hide mistakes
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in name and "lm_head" not in name:
                parameter.mul_(4.0)
    return model


def quirks(family: str, layers: int, for_llama_cpp: bool = False) -> dict[str, object]:
    """A family's entry of :data:`QUIRKS` for so many layers."""
    found = QUIRKS.get(family, {}) | (FOR_LLAMA_CPP.get(family, {}) if for_llama_cpp else {})
    return {name: value[:layers] if isinstance(value, list) else value for name, value in found.items()}


SHAPES = [
    pytest.param(
        family, attention, tied, biased, id=f"{family}-{attention}-{'tied' if tied else 'untied'}{'-biased' * biased}"
    )
    for family, attention, tied, biased in itertools.chain(
        itertools.product(("llama",), ATTENTION, (False, True), (False, True)),
        ((family, "gqa", False, False) for family in FAMILIES if family != "llama"),
        [("qwen2", "gqa", True, False), ("qwen2", "mha", False, False)],
        [("qwen3", "mqa", True, False), ("qwen3", "gqa", False, True)],
    )
]


def tiny_batch(rows: int = 3, tokens: int = 17, seed: int = 1, vocabulary: int = 64) -> dict[str, torch.Tensor]:
    """A right-padded batch with labels."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, tokens - 4 :] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture
def shared() -> Path:
    """The folder of real checkpoints and data beside the project; the test is skipped where it is absent."""
    path = Path(__file__).parent.parent.parent / "shared"
    if not (path / "models").is_dir():
        pytest.skip("real checkpoints and data (../shared) are not here")
    return path
