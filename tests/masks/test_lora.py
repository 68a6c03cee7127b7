"""LoRA with masks: what trains, what masks do to values and gradients, merging."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPES, tiny_batch, tiny_model

from atp.errors import UserError
from atp.masks.lora import MaskedModel, add_lora, trainable_parameters
from atp.masks.merging import merge_in_place, merged_state
from atp.model.families import FAMILIES
from atp.space.space import PruningSpace

BATCH = tiny_batch()
INPUTS = {k: BATCH[k] for k in ("input_ids", "attention_mask")}


def make(kinds: tuple[str, ...] = ("heads", "channels"), **shape: object) -> MaskedModel:
    model = tiny_model(**shape)  # type: ignore[arg-type]
    space = PruningSpace.from_model(model, kinds)
    return MaskedModel(add_lora(model, r=2, alpha=4), space)


def test_only_adapters_train_and_all_seven_linears_have_one() -> None:
    masked = make()
    names = set(trainable_parameters(masked))
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert adapted == {name.rpartition(".")[2] for name in FAMILIES["llama"].linears.values()}
    assert len(names) == 2 * 7 * 2
    assert all(parameter.dtype == torch.float32 for parameter in trainable_parameters(masked).values())


def test_bfloat16_base_keeps_float32_adapters() -> None:
    model = tiny_model().to(torch.bfloat16)
    space = PruningSpace.from_model(model)
    masked = MaskedModel(add_lora(model, r=2), space)
    assert {p.dtype for p in trainable_parameters(masked).values()} == {torch.float32}
    assert {p.dtype for p in masked.parameters() if not p.requires_grad} == {torch.bfloat16}
    masked.set_masks(torch.ones(masked.space.num_units))
    assert torch.isfinite(masked(**BATCH).loss)


def test_mask_gradient_is_the_gates_derivative() -> None:
    """Gradient of the loss by a gate, against a central difference."""
    masked = make(layers=1)
    masks_U = torch.full((masked.space.num_units,), 0.7, requires_grad=True)
    masked.set_masks(masks_U)
    masked(**BATCH).loss.backward()
    for unit in (0, 2, masked.space.num_units - 1):
        losses = []
        for step in (0.02, -0.02):
            moved = masks_U.detach().clone()
            moved[unit] += step
            masked.set_masks(moved)
            losses.append(masked(**BATCH).loss.item())
        numeric = (losses[0] - losses[1]) / 0.04
        assert abs(numeric - masks_U.grad[unit].item()) < 1e-4 + 1e-2 * abs(numeric)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        masked = make().train()
        if checkpointed:
            base = masked.peft_model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        masks_U = torch.full((masked.space.num_units,), 0.6, requires_grad=True)
        masked.set_masks(masks_U)
        masked(**BATCH).loss.backward()
        gradients.append(masks_U.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_zero_mask_silences_base_and_adapter() -> None:
    """With every unit of a layer masked, its adapters get no gradient: nothing of it reaches the output."""
    masked = make()
    masks_U = torch.ones(masked.space.num_units)
    for axis in masked.space.layers[0].axes.values():
        masks_U[axis.offset : axis.offset + axis.size] = 0
    masked.set_masks(masks_U)
    for name, parameter in trainable_parameters(masked).items():
        if "lora_B" in name:
            parameter.data.normal_()
    masked(**BATCH).loss.backward()
    for name, parameter in trainable_parameters(masked).items():
        is_first = ".layers.0." in name
        assert bool((parameter.grad != 0).any()) is not is_first, name


def test_contexts_restore_masks_and_adapters() -> None:
    masked = make().eval()
    dense = tiny_model()(**INPUTS).logits
    for name, parameter in trainable_parameters(masked).items():
        if "lora_B" in name:
            parameter.data.normal_()
    masks_U = torch.ones(masked.space.num_units)
    masks_U[::2] = 0
    masked.set_masks(masks_U)
    before = masked(**INPUTS).logits
    with masked.base_only():
        torch.testing.assert_close(masked(**INPUTS).logits, dense)
    assert torch.equal(masked(**INPUTS).logits, before)


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
def test_merging_keeps_the_function_and_the_names(family: str, attention: str, tied: bool, biased: bool) -> None:
    reference = tiny_model(family, attention, tied=tied, biased=biased)
    masked = make(family=family, attention=attention, tied=tied, biased=biased).eval()
    for name, parameter in trainable_parameters(masked).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    tuned = masked(**INPUTS).logits
    state = merged_state(masked.peft_model)
    assert set(state) == set(reference.state_dict())
    reference.load_state_dict(state)
    torch.testing.assert_close(reference(**INPUTS).logits, tuned, rtol=1e-4, atol=1e-5)
    assert torch.equal(masked(**INPUTS).logits, tuned), "merging a copy leaves the adapters as they were"
    merged = merge_in_place(masked.peft_model)
    torch.testing.assert_close(merged(**INPUTS).logits, tuned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["c_attn"]}, r"'c_attn'.*matches no linear.*q_proj"),
        ({"target_modules": []}, "no name"),
        ({"r": 0}, r"lora\.r is 0"),
        ({"dropout": 1.5}, r"lora\.dropout is 1\.5"),
    ],
)
def test_bad_lora_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(tiny_model(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"q_prj.*matches no linear layer.*its linears are down_proj.*q_proj"),
        (["mlp.q_proj"], r"mlp\.q_proj.*matches no linear layer"),
        (["embed_tokens"], r"embed_tokens.*matches no linear layer"),
        (["q_proj", "lm_head"], r"holds \['lm_head'\].*shares one weight.*tie_word_embeddings.*take it out"),
        ([], r"no name"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(tiny_model(tied=True), target_modules=targets)
