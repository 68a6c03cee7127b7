"""Layer-by-layer repair: closer to the dense model, exact under removal, and nothing else is touched."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_model

from atp.cut.removal import kept_indices, max_logit_difference, remove
from atp.cut.selection import select
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import merged_tensors
from atp.prepare.blockwise import Repair, _Inputs, repair
from atp.space.space import PruningSpace

SPACES = [
    ("heads", "channels"),
    ("heads", "query_heads", "channels"),
    ("qk_pairs", "value_dims", "channels"),
    ("heads", "channels", "hidden"),
]
TRAINED = Repair(epochs=3)


def masked_model(family: str, attention: str, kinds: tuple[str, ...], **options: bool) -> MaskedModel:
    model = tiny_model(family, attention, **options)
    space = PruningSpace.from_model(model, kinds)
    return MaskedModel(add_lora(model, r=3), space).eval()


def choose(masked: MaskedModel, sparsity: float = 0.25) -> torch.Tensor:
    scores_U = torch.rand(masked.space.num_units, generator=torch.Generator().manual_seed(2))
    return select(masked.space, scores_U, sparsity)


def batches() -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for length in (16, 12, 16, 9):
        ids = torch.randint(3, 64, (4, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        yield {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_inputs_that_are_kept_are_those_of_the_whole_pass(family: str) -> None:
    """What the layers are given one by one is what they get when the model runs, for every batch."""
    model, data = tiny_model(family, "gqa"), list(batches())
    prefixes = [layer.prefix for layer in PruningSpace.from_model(model).layers]
    layers = [model.get_submodule(prefix) for prefix in prefixes]
    inputs = _Inputs(model, layers, data)
    for index, layer in enumerate(layers):
        with torch.no_grad():
            inputs.advance(index, layer)
        for batch, kept in zip(data, inputs.hidden, strict=True):
            assert torch.equal(kept, hidden_after(model, layer, batch))


def hidden_after(model: torch.nn.Module, layer: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


def distance(masked: MaskedModel, masks_U: torch.Tensor, dense: list[torch.Tensor]) -> float:
    """Mean squared distance of the masked model's logits from the dense ones, on real tokens."""
    masked.set_masks(masks_U)
    total = 0.0
    with torch.no_grad():
        for batch, wanted in zip(batches(), dense, strict=True):
            total += float((masked(**batch).logits - wanted)[batch["attention_mask"].bool()].square().mean())
    masked.set_masks(None)
    return total


def dense_logits(masked: MaskedModel) -> list[torch.Tensor]:
    with torch.no_grad():
        return [masked(**batch).logits for batch in batches()]


@pytest.mark.parametrize("kinds", SPACES, ids="+".join)
@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "gqa"), ("llama", "mha"), ("llama", "mqa"), ("qwen3", "gqa")]
)
def test_the_repaired_model_is_closer_and_removal_agrees(family: str, attention: str, kinds: tuple[str, ...]) -> None:
    if "query_heads" in kinds and attention == "mha":
        pytest.skip("query heads within groups need groups")
    masked = masked_model(family, attention, kinds)
    masks_U, dense = choose(masked), dense_logits(masked)
    cut = distance(masked, masks_U, dense)
    repair(masked, masks_U, batches, TRAINED)
    assert distance(masked, masks_U, dense) < 0.9 * cut
    masked.set_masks(masks_U)
    config = masked.peft_model.get_base_model().config
    removed = remove(merged_tensors(masked.peft_model), config, masked.space, masks_U)
    assert max_logit_difference(masked, removed, batches()) < 1e-4


def test_steps_mend_more_than_the_fit_alone() -> None:
    first, second = (masked_model("llama", "gqa", ("heads", "channels")) for _ in range(2))
    masks_U, dense = choose(first), dense_logits(first)
    repair(first, masks_U, batches)
    repair(second, masks_U, batches, Repair(epochs=10))
    assert distance(second, masks_U, dense) < 0.8 * distance(first, masks_U, dense)


@pytest.mark.parametrize("biased", [False, True])
def test_only_kept_weights_change_and_all_are_named(biased: bool) -> None:
    masked = masked_model("llama", "gqa", ("heads", "channels"), biased=biased, tied=biased)
    masks_U = choose(masked)
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    names = repair(masked, masks_U, batches, TRAINED)
    changed = {name for name, value in masked.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(names) == {masked.base_weight_name(weight.module) for weight in masked.space.weights}
    masks = masked.space.split(masks_U)
    for weight in masked.space.weights:
        now, was = masked.base_weight(weight.module), before[masked.base_weight_name(weight.module)]
        gone = torch.ones_like(now, dtype=torch.bool)
        rows, columns = kept_indices(weight.rows, masks), kept_indices(weight.columns, masks)
        rows = torch.arange(len(now)) if rows is None else rows
        columns = torch.arange(now.shape[1]) if columns is None else columns
        gone[rows[:, None], columns[None, :]] = False
        assert torch.equal(now[gone], was[gone])
    assert not any(parameter.requires_grad for name, parameter in masked.named_parameters() if "lora_" not in name)


def test_adapters_count_and_stay() -> None:
    """The target is what the unmasked model, adapters included, does."""
    masked = masked_model("llama", "gqa", ("heads", "channels"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in masked.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    adapters = {name: value.clone() for name, value in masked.state_dict().items() if "lora_" in name}
    masks_U, dense = choose(masked), dense_logits(masked)
    cut = distance(masked, masks_U, dense)
    repair(masked, masks_U, batches, TRAINED)
    assert distance(masked, masks_U, dense) < 0.9 * cut
    assert all(torch.equal(value, masked.state_dict()[name]) for name, value in adapters.items())


def test_two_repairs_agree_to_the_last_bit() -> None:
    states = []
    for _ in range(2):
        masked = masked_model("llama", "gqa", ("heads", "channels"))
        repair(masked, choose(masked), batches, TRAINED)
        states.append(masked.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_layer_without_units_is_passed() -> None:
    masked = masked_model("llama", "gqa", ("heads", "channels"))
    masks_U = torch.ones(masked.space.num_units)
    masked.space.split(masks_U)["layers.0.heads"].zero_()
    masked.space.split(masks_U)["layers.0.channels"].zero_()
    masked.space.split(masks_U)["layers.1.channels"][:7].zero_()
    names = repair(masked, masks_U, batches, TRAINED)
    assert names and all(".layers.1." in name for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(dtype: torch.dtype) -> None:
    masked = masked_model("llama", "gqa", ("heads", "channels"))
    masked.peft_model.get_base_model().to(dtype)
    masks_U, dense = choose(masked), dense_logits(masked)
    cut = distance(masked, masks_U, dense)
    repair(masked, masks_U, batches, TRAINED)
    assert masked.base_weight("model.layers.0.mlp.down_proj").dtype == dtype
    assert distance(masked, masks_U, dense) < cut


def test_progress_is_told(caplog: pytest.LogCaptureFixture) -> None:
    masked = masked_model("llama", "gqa", ("heads", "channels"))
    with caplog.at_level(logging.INFO, logger="atp"):
        repair(masked, choose(masked), batches, TRAINED)
    assert [record.message.split(", error")[0] for record in caplog.records] == [
        "repair: layer 1 of 2",
        "repair: layer 2 of 2",
    ]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"prune\.repair\.epochs is -1"):
        Repair(epochs=-1)
    with pytest.raises(ValueError, match=r"prune\.repair\.lr is 0"):
        Repair(epochs=1, lr=0)
    masked = masked_model("llama", "gqa", ("heads", "channels"))
    with pytest.raises(ValueError, match=r"raise prune\.repair\.batches"):
        repair(masked, choose(masked), lambda: [], TRAINED)
    with pytest.raises(ValueError, match=r"lower prune\.repair\.lr"):
        repair(masked, choose(masked), batches, Repair(epochs=2, lr=1e30))
