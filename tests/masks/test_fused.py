"""What the fused functions compute and how gradients flow, against plain expressions."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_batch, tiny_model
from torch import Tensor, nn

from atp.masks import fused
from atp.masks.fused import masked_gated, vocabulary_loss
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.loss import causal_loss
from atp.space.space import PruningSpace


def swiglu_inputs(dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 3, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    return gate, up, torch.tensor([0.0, 0.3, 1.0, 0.0, 0.7], dtype=dtype, requires_grad=True)


def test_masked_gated_has_the_gradients_of_its_definition_that_of_the_mask_included() -> None:
    gate, up, mask = swiglu_inputs()
    assert torch.autograd.gradcheck(masked_gated, (gate, up, mask))
    assert torch.autograd.gradcheck(lambda g, u: masked_gated(g, u), (gate, up))
    torch.testing.assert_close(masked_gated(gate, up, mask), mask * nn.functional.silu(gate) * up)


def test_masked_gated_in_bfloat16_sums_the_masks_gradient_in_float32() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(400, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    mask = torch.ones(8, requires_grad=True)
    result = masked_gated(gate, up, mask)
    result.sum().backward()
    exact = (nn.functional.silu(gate.detach().double()) * up.detach().double()).sum(0)
    assert result.dtype == torch.bfloat16
    assert mask.grad is not None
    torch.testing.assert_close(mask.grad.double(), exact, atol=0.1, rtol=0.01)


def test_masked_gated_keeps_two_tensors_where_autograd_keeps_four() -> None:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    gate, up, mask = swiglu_inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        masked_gated(gate, up, mask)
    assert kept == [(2, 3, 5), (2, 3, 5), (5,)]


@pytest.mark.parametrize("chunk", [1, 2**20], ids=["many-chunks", "one-chunk"])
def test_vocabulary_loss_is_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused._CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(3, 41, 6, dtype=torch.double, requires_grad=True)
    head = torch.randn(11, 6, dtype=torch.double)
    labels = torch.randint(0, 11, (3, 41))
    labels[0, :7] = -100
    loss = vocabulary_loss(hidden, head, labels)
    logits = nn.functional.linear(hidden, head)[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(2 * loss, hidden)
    (wanted,) = torch.autograd.grad(2 * expected, hidden)
    torch.testing.assert_close(gradient, wanted)
    counted = vocabulary_loss(hidden, head, labels, int((labels[:, 1:] != -100).sum()))
    torch.testing.assert_close(counted, loss, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(2 * counted, hidden)[0], wanted)
    with torch.no_grad():
        torch.testing.assert_close(vocabulary_loss(hidden, head, labels), expected)


def test_nothing_to_learn_is_not_a_number_as_it_always_was() -> None:
    hidden, head = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4)
    assert torch.isnan(vocabulary_loss(hidden, head, torch.full((1, 3), -100)))


@pytest.mark.parametrize(("attention", "tied"), [("gqa", False), ("mha", True)])
@pytest.mark.parametrize("kinds", [("heads", "channels"), ("query_heads", "hidden"), ("heads", "value_dims")])
def test_a_joint_steps_loss_and_gradients_are_those_of_plain_autograd(
    attention: str, tied: bool, kinds: tuple[str, ...]
) -> None:
    """Against masks multiplied into the inputs of the output projections of an unchanged PEFT model."""
    if attention == "mha" and "query_heads" in kinds:
        pytest.skip("one query head per KV head")
    model = tiny_model("llama", attention, tied=tied)
    space = PruningSpace.from_model(model, kinds)
    masked = MaskedModel(add_lora(model, r=2), space)
    torch.manual_seed(3)
    for name, parameter in masked.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    masks_U = (torch.rand(space.num_units) * (torch.rand(space.num_units) > 0.3)).requires_grad_()
    batch = tiny_batch()
    masked.set_masks(masks_U)
    wanted = {name: p for name, p in masked.named_parameters() if p.requires_grad} | {"masks": masks_U}
    loss = causal_loss(masked, batch)
    found = torch.autograd.grad(loss, list(wanted.values()))

    reference = add_lora(tiny_model("llama", attention, tied=tied), r=2)
    reference.load_state_dict({n.removeprefix("peft_model."): t for n, t in masked.state_dict().items()})
    for module in reference.modules():
        vars(module).pop("forward", None)
    by_axis = space.split(masks_U)
    for site in space.sites:
        module = reference.get_submodule("base_model.model." + site.module)
        factor = site.side.expand(by_axis)
        if site.on == "input":
            module.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor,))
        else:
            module.register_forward_hook(lambda _, args, output, factor=factor: output * factor)
    plain = reference(**batch).loss
    torch.testing.assert_close(loss, plain)
    parameters = {f"peft_model.{n}": p for n, p in reference.named_parameters() if p.requires_grad} | {"masks": masks_U}
    gradients = torch.autograd.grad(plain, list(parameters.values()))
    for name, gradient, expected in zip(parameters, found, gradients, strict=True):
        assert torch.allclose(gradient, expected, atol=2e-5, rtol=1e-4), name


def test_the_loss_of_a_model_that_trains_as_a_whole_takes_the_usual_way() -> None:
    model, batch = tiny_model("llama", "gqa"), tiny_batch()
    loss = causal_loss(model, batch)
    (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
    assert float(gradient.abs().sum()) > 0
    torch.testing.assert_close(loss, model(**batch).loss)


def test_disabled_adapters_and_other_dtypes_take_peft_own_way() -> None:
    peft_model, batch = add_lora(tiny_model("llama", "gqa").to(torch.bfloat16), r=2), tiny_batch()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    base = tiny_model("llama", "gqa").to(torch.bfloat16)
    with peft_model.disable_adapter():
        torch.testing.assert_close(peft_model(**batch).logits, base(**batch).logits)
    adapted = peft_model(**batch).logits
    for module in peft_model.modules():
        vars(module).pop("forward", None)
    assert torch.equal(adapted, peft_model(**batch).logits)
