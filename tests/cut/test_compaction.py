"""Cutting the live model changes its size and nothing it computes, learns or exports."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from atp.cut.compaction import cut_live, expanded_state, live_units
from atp.cut.removal import max_logit_difference, remove, slice_adapter
from atp.cut.selection import select
from atp.masks.adapter import extract_adapter
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import base_tensors, merged_tensors
from atp.space.space import PruningSpace

SHAPES = [
    ("llama", "mha", ("heads", "channels")),
    ("llama", "gqa", ("heads", "channels")),
    ("mistral", "mqa", ("channels",)),
    ("qwen2", "gqa", ("heads", "query_heads", "channels")),
    ("qwen3", "gqa", ("query_heads", "channels")),
]


def masked_model(family: str, attention: str, kinds: tuple[str, ...], *, biased: bool = False) -> MaskedModel:
    model = tiny_model(family, attention, biased=biased)
    space = PruningSpace.from_model(model, kinds)
    masked = MaskedModel(add_lora(model, r=3), space)
    torch.manual_seed(1)
    for name, parameter in masked.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    return masked


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (2, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def masks_of(masked: MaskedModel, sparsity: float = 0.4, **options: object) -> torch.Tensor:
    scores_U = torch.rand(masked.space.num_units, generator=torch.Generator().manual_seed(2))
    return select(masked.space, scores_U, sparsity, **options)  # type: ignore[arg-type]


def train(masked: MaskedModel, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = masked(**batch(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adapters(masked: MaskedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in masked.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "attention", "kinds"), SHAPES)
def test_training_goes_on_as_if_nothing_was_cut(family: str, attention: str, kinds: tuple[str, ...]) -> None:
    biased = family == "llama"
    masked, reference = (masked_model(family, attention, kinds, biased=biased) for _ in range(2))
    masks_U = masks_of(masked, 0.25)
    optimizers = []
    for model in (masked, reference):
        model.set_masks(masks_U)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0))
        train(model, optimizers[-1], range(3))
    optimizer, reference_optimizer = optimizers

    before = sum(p.numel() for p in masked.parameters())
    cut_live(masked, masks_U, [optimizer])
    after = sum(p.numel() for p in masked.parameters())
    assert after < 0.9 * before
    for parameter in masked.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            assert value.shape in (parameter.shape, torch.Size([]))
    assert train(masked, optimizer, range(3, 8)) == pytest.approx(
        train(reference, reference_optimizer, range(3, 8)), rel=1e-5
    )

    dense = masked_model(family, attention, kinds, biased=biased)
    state = dict(expanded_state(adapters(masked), masked.space, masks_U))
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in adapters(dense).items()}
    dense.load_state_dict(state, strict=False)
    dense.set_masks(masks_U)
    assert max_logit_difference(masked.eval(), dense.eval(), [batch(9)]) < 1e-5
    config = dense.peft_model.get_base_model().config
    removed = remove(merged_tensors(dense.peft_model), config, dense.space, masks_U)
    assert max_logit_difference(masked, removed, [batch(9)]) < 1e-5


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["layers.1.mlp.down_proj"], ["lm_head"], ["k_proj", "lm_head"]],
    ids="-".join,
)
def test_any_set_of_adapters_comes_back_from_a_cut_model(targets: list[str]) -> None:
    """Base weights that a repair changed are in the checkpoint too, under the names of linears with and without."""

    def build() -> MaskedModel:
        model = tiny_model("llama", "gqa", biased=True)
        space = PruningSpace.from_model(model)
        masked = MaskedModel(add_lora(model, r=3, target_modules=targets), space)
        torch.manual_seed(1)
        for name, parameter in masked.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        return masked

    masked, dense = build(), build()
    masks_U = masks_of(masked)
    masked.set_masks(masks_U)
    repaired = [masked.base_weight_name(weight.module) for weight in masked.space.weights]
    for name in repaired:
        masked.get_parameter(name).data.mul_(1.1)
    optimizer = torch.optim.AdamW([p for p in masked.parameters() if p.requires_grad], lr=1e-2)
    train(masked, optimizer, range(2))
    cut_live(masked, masks_U, [optimizer])
    train(masked, optimizer, range(2, 4))
    kept = {name: p.detach() for name, p in masked.named_parameters() if p.requires_grad or name in repaired}
    dense.load_state_dict(dict(expanded_state(kept, masked.space, masks_U)), strict=False)
    dense.set_masks(masks_U)
    config = dense.peft_model.get_base_model().config
    removed = remove(merged_tensors(dense.peft_model), config, dense.space, masks_U)
    assert max_logit_difference(masked.eval(), removed, [batch(9)]) < 1e-5
    adapter = slice_adapter(extract_adapter(dense.peft_model), dense.space, masks_U)
    base = remove(base_tensors(dense.peft_model), config, dense.space, masks_U)
    for name, parameter in base.named_parameters():
        parameter.data.copy_(adapter.added_to(name, parameter.data))
    assert max_logit_difference(removed, base, [batch(9)]) < 1e-5


def test_gradients_are_those_of_the_kept_entries() -> None:
    masked, reference = (masked_model("llama", "gqa", ("heads", "channels")) for _ in range(2))
    masks_U = masks_of(masked)
    reference.set_masks(masks_U)
    cut_live(masked, masks_U)
    for model in (masked, reference):
        model(**batch()).loss.backward()
    small = {name: p.grad for name, p in masked.named_parameters() if p.requires_grad}
    expanded = dict(expanded_state(small, masked.space, masks_U))  # type: ignore[arg-type]
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(expanded[name], parameter.grad, atol=1e-6), name


def test_a_graph_that_is_still_alive_does_not_stop_the_next_backward() -> None:
    masked = masked_model("llama", "gqa", ("heads", "channels"))
    masks_U = masks_of(masked)
    masked.set_masks(masks_U)
    earlier = masked(**batch()).loss
    cut_live(masked, masks_U)
    masked(**batch()).loss.backward()
    shapes = {name: (p.shape, p.grad.shape) for name, p in masked.named_parameters() if p.grad is not None}
    assert earlier.requires_grad
    assert shapes and all(parameter == gradient for parameter, gradient in shapes.values())


@pytest.mark.parametrize("kinds", [("heads", "channels"), ("heads", "query_heads", "channels")])
def test_a_block_that_vanishes_keeps_one_hidden_unit(kinds: tuple[str, ...]) -> None:
    masked, reference = (masked_model("llama", "gqa", kinds) for _ in range(2))
    masks_U = torch.ones(masked.space.num_units)
    masks = masked.space.split(masks_U)
    for kind in kinds:
        masks[f"layers.0.{kind}"].zero_()
    reference.set_masks(masks_U)
    cut_live(masked, masks_U)
    assert max_logit_difference(masked.eval(), reference.eval(), [batch()]) < 1e-5
    live = masked.space.split(live_units(masked.space, masks_U))
    assert [int(live[f"layers.0.{kind}"].sum()) for kind in kinds] == ([1, 1] if len(kinds) == 2 else [1, 2, 1])


def test_compact_models_have_fixed_masks_and_no_dense_self() -> None:
    masked = masked_model("llama", "gqa", ("heads", "channels")).eval()
    masks_U = masks_of(masked)
    cut_live(masked, masks_U)
    before = masked(**batch()).logits
    masked.set_masks(torch.zeros(masked.space.num_units))
    assert torch.equal(masked(**batch()).logits, before)
    with pytest.raises(RuntimeError, match=r"prune\.compact=false"), masked.base_only():
        pass


def test_gradient_checkpointing_survives_the_cut() -> None:
    losses = []
    for cut, checkpointing in itertools.product((False, True), repeat=2):
        masked = masked_model("llama", "gqa", ("heads", "channels"))
        if checkpointing:
            base = masked.peft_model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()
        masks_U = masks_of(masked)
        masked.set_masks(masks_U)
        if cut:
            cut_live(masked, masks_U)
        optimizer = torch.optim.AdamW([p for p in masked.parameters() if p.requires_grad], lr=1e-2)
        losses.append(train(masked.train(), optimizer, range(3)))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_quantised_weights_are_left_alone_with_a_way_out() -> None:
    masked = masked_model("llama", "gqa", ("heads", "channels"))
    layer = masked.linear("model.layers.0.mlp.down_proj").get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj\.base_layer\.weight.*prune\.compact=false"):
        cut_live(masked, masks_of(masked))
    assert not masked.is_compact


@pytest.mark.slow
def test_two_processes_cut_and_go_on_together() -> None:
    ends = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for how in ("compact", "masked"):
        command = [sys.executable, str(Path(__file__).parent / "ddp_compaction.py"), how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        ends[how] = [json.loads(line) for line in re.findall(r"\{\"rank\".*?\}", done.stdout)]
    for how, both in ends.items():
        assert sorted(end["rank"] for end in both) == [0, 1]
        assert both[0]["sum"] == pytest.approx(both[1]["sum"], rel=1e-12)
        assert all(end["compact"] is (how == "compact") and end["steps"] == 10 for end in both)
    assert ends["compact"][0]["loss"] == pytest.approx(ends["masked"][0]["loss"], rel=1e-4)
