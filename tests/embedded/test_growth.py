"""The larger sibling of the embedded base: it computes what the base does, and all of it can learn."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from atp.embedded import base_dir, growth
from atp.embedded.pretrain import Settings


def _config(layers: int = 2, heads: int = 4, kv: int = 2, channels: int = 24, *, tied: bool = True) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=60,
        hidden_size=36,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=8,
        intermediate_size=channels,
        tie_word_embeddings=tied,
    )


def _base(config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("heads", "larger"),
    [((4, 4), (6, 6)), ((4, 2), (6, 3)), ((4, 2), (9, 3)), ((4, 1), (12, 2)), ((4, 2), (4, 2))],
    ids=["mha", "gqa", "wider groups", "mqa", "heads kept"],
)
def test_the_grown_model_computes_what_the_base_does(heads, larger, tied):
    base = _base(_config(2, *heads, tied=tied))
    grown = growth.grow(base, _config(5, *larger, channels=40, tied=tied)).eval()
    ids_BT = torch.randint(60, (3, 11))
    torch.testing.assert_close(grown(ids_BT).logits, base(ids_BT).logits, rtol=1e-5, atol=1e-5)
    assert grown.num_parameters() > base.num_parameters()


def test_every_weight_of_the_grown_model_learns():
    grown = growth.grow(_base(_config()), _config(4, 6, 3, 40)).train()
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.5)
    ids_BT = torch.randint(60, (4, 16))
    for _ in range(2):
        optimizer.zero_grad()
        grown(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
    for name, parameter in grown.named_parameters():
        rows = parameter.grad.flatten(1) if parameter.ndim == 2 else parameter.grad[:, None]
        assert rows.abs().sum(1).gt(0).float().mean() > 0.9, name


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((1, 4, 2, 24), "num_hidden_layers=1"),
        ((2, 4, 2, 8), "intermediate_size=8"),
        ((2, 4, 4, 24), "num_attention_heads=4"),
    ],
)
def test_a_shape_that_cannot_hold_the_base_is_named(shape, named):
    with pytest.raises(ValueError, match=named):
        growth.grow(_base(_config()), _config(*shape))


def test_another_hidden_width_is_named():
    other = _config()
    other.hidden_size = 64
    with pytest.raises(ValueError, match="hidden_size=64"):
        growth.grow(_base(_config()), other)


def test_the_sibling_of_the_base_that_ships_is_twice_its_size():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base_dir())
    base = LlamaForCausalLM.from_pretrained(base_dir(), dtype=torch.float32).eval()
    grown = growth.sibling(tokenizer).eval()
    ids_BT = torch.randint(3, len(tokenizer), (2, 40))
    torch.testing.assert_close(grown(ids_BT).logits, base(ids_BT).logits, rtol=1e-4, atol=1e-4)
    assert 2.0 < grown.num_parameters() / base.num_parameters() < 2.5
    tokenizer.add_tokens(["another"])
    with pytest.raises(ValueError, match="has other tokens"):
        growth.sibling(tokenizer)


def test_the_command_repeats_the_flag():
    assert Settings(larger=True, steps=9).command() == "python -m atp.embedded.pretrain --steps 9 --larger"
