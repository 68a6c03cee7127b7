"""Every row of the table through the flow: masks, loss, importance, repair, removal, exports, generation, evaluation.

A new row gets these tests for free; what makes its tiny model its own stands in ``conftest.QUIRKS``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ATTENTION, tiny_batch, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import CPU, naive_nats
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from atp.cut.compaction import can_cut_live, cut_live
from atp.cut.removal import max_logit_difference, remove, slice_adapter
from atp.cut.selection import select
from atp.data.encoding import Choices
from atp.errors import UserError
from atp.evaluate.scoring import choice_nats, evaluating
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.masks.adapter import extract_adapter
from atp.masks.gates import fold
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.loss import causal_loss
from atp.masks.merging import base_tensors, merged_tensors
from atp.model.families import FAMILIES, Family, is_stock
from atp.prepare.blockwise import Repair, repair
from atp.prepare.comparison import repaired_losses
from atp.prepare.criteria import CRITERIA, importances
from atp.space.space import KINDS, PruningSpace
from atp.train.cuttable import why_uncut

LAYERS = 3
BATCH = tiny_batch(tokens=23)
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def kinds_of(family: Family) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if kind not in family.refused)


def masked_model(family: Family, kinds: tuple[str, ...] = (), *, tied: bool = False) -> MaskedModel:
    """With adapters far from zero."""
    model = tiny_model(family.model_type, layers=LAYERS, tied=tied)
    space = PruningSpace.from_model(model, kinds or kinds_of(family))
    masked = MaskedModel(add_lora(model, r=2, alpha=4), space).eval()
    torch.manual_seed(3)
    for name, parameter in masked.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    return masked


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def base_config(masked: MaskedModel):
    return masked.peft_model.get_base_model().config


def emptied(space: PruningSpace, masks_U: Tensor) -> Tensor:
    """Masks under which the first layer has lost its attention and the last its FFN, where they can be lost."""
    masks_U = masks_U.clone()
    for layer, kind in ((space.layers[0], "heads"), (space.layers[-1], "channels")):
        if kind in layer.axes and kind not in layer.output_bias:
            axis = layer.axes[kind]
            masks_U[axis.offset : axis.offset + axis.size] = 0.0
    return masks_U


def random_masks(space: PruningSpace, sparsity: float, seed: int = 0) -> Tensor:
    return select(space, torch.randn(space.num_units, generator=torch.Generator().manual_seed(seed)), sparsity)


def uniform_masks(space: PruningSpace) -> Tensor:
    """Masks that take the first third of every axis."""
    masks_U = torch.ones(space.num_units)
    for axis in space.axes:
        masks_U[axis.offset : axis.offset + axis.size // 3] = 0.0
    return masks_U


def removed_model(masked: MaskedModel, masks_U: Tensor) -> PreTrainedModel:
    masked.set_masks(masks_U)
    return remove(merged_tensors(masked.peft_model), base_config(masked), masked.space, masks_U)


@EVERY
@pytest.mark.parametrize("tied", [False, True])
def test_masked_removed_and_reloaded_model_are_one(family: Family, tied: bool, tmp_path: Path) -> None:
    masked = masked_model(family, tied=tied)
    for number, masks_U in enumerate(
        (random_masks(masked.space, 0.4), emptied(masked.space, random_masks(masked.space, 0.2)))
    ):
        small = removed_model(masked, masks_U)
        assert max_logit_difference(masked, small, [BATCH]) < 1e-4
        export_hf(small, None, tmp_path / str(number))
        assert max_logit_difference(masked, load_exported(tmp_path / str(number)), [BATCH]) < 1e-4


@EVERY
def test_equal_widths_load_in_the_stock_class_without_a_flag(family: Family, tmp_path: Path) -> None:
    kinds = tuple(kind for kind in ("heads", "channels", "hidden") if kind not in family.refused)
    masked = masked_model(family, kinds)
    masks_U = uniform_masks(masked.space)
    export_hf(removed_model(masked, masks_U), None, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(loaded).__module__.startswith("transformers.models.") and is_stock(loaded.config)
    assert max_logit_difference(masked, loaded, [BATCH]) < 1e-4


@EVERY
def test_an_adapter_beside_the_pruned_base_is_the_tuned_model(family: Family, tmp_path: Path) -> None:
    masked = masked_model(family)
    masks_U = random_masks(masked.space, 0.3)
    masked.set_masks(masks_U)
    base = remove(base_tensors(masked.peft_model), base_config(masked), masked.space, masks_U)
    adapter = slice_adapter(extract_adapter(masked.peft_model), masked.space, masks_U)
    export_hf(base, None, tmp_path / "model", adapter=adapter)
    assert max_logit_difference(masked, load_exported(tmp_path / "model"), [BATCH]) < 1e-4


@EVERY
def test_the_fused_loss_has_the_value_and_gradients_of_the_models_own(family: Family) -> None:
    masked = masked_model(family)
    masks_U = (0.5 + 0.5 * torch.rand(masked.space.num_units)).requires_grad_()
    wanted = [p for p in masked.parameters() if p.requires_grad]
    masked.set_masks(masks_U)
    loss = causal_loss(masked, BATCH)
    found = torch.autograd.grad(loss, [*wanted, masks_U])
    for module in masked.peft_model.modules():
        vars(module).pop("forward", None)
    masked.set_masks(masks_U)
    by_axis = masked.space.split(masks_U)
    for module, side in masked.space.gated_blocks().items():
        down = masked.space.family.linears["down"].rpartition(".")[2]
        factor = side.expand(by_axis) if side else 1.0
        masked.linear(module).get_submodule(down).register_forward_pre_hook(lambda _, args, m=factor: (args[0] * m,))
    plain = masked(**BATCH).loss
    torch.testing.assert_close(loss, plain)
    for gradient, expected in zip(found, torch.autograd.grad(plain, [*wanted, masks_U]), strict=True):
        torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-3)


@EVERY
def test_every_importance_is_finite_and_a_repaired_cut_is_nearer_to_the_dense_model(family: Family) -> None:
    masked = masked_model(family)
    found = importances([*CRITERIA], masked, [BATCH])
    assert all(torch.isfinite(values).all() and (values >= 0).all() for values in found.values())
    masks_U = random_masks(masked.space, 0.25)
    compared = repaired_losses(masked, {"random": masks_U}, lambda scores: scores, causal_loss, [BATCH])
    assert compared.losses["random"] > 0
    real_BT, dense = BATCH["attention_mask"].bool(), logits(masked)
    distances = []
    for how in (None, Repair(epochs=0), Repair(epochs=8, lr=0.02)):
        if how:
            repair(masked, masks_U, lambda: [BATCH], how)
        masked.set_masks(masks_U)
        distances.append(float((logits(masked) - dense)[real_BT].square().mean()))
        masked.set_masks(None)
    assert distances[2] < distances[0]
    small = removed_model(masked, masks_U)
    assert max_logit_difference(masked, small, [BATCH]) < 1e-4


def padded(model: PreTrainedModel) -> dict[str, Tensor]:
    """Three prompts, padded on the left, longer than any window of a tiny model."""
    torch.manual_seed(1)
    input_ids, attention_mask = torch.randint(4, 64, (3, 15)), torch.ones(3, 15, dtype=torch.long)
    for row, padding in enumerate((0, 3, 8)):
        input_ids[row, :padding], attention_mask[row, :padding] = 0, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@EVERY
def test_generation_follows_neither_cache_nor_padding(family: Family) -> None:
    masked = masked_model(family)
    model = removed_model(masked, emptied(masked.space, random_masks(masked.space, 0.2)))
    batch = padded(model)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(model.generate(**batch, **options), greedy)
    assert torch.equal(model.generate(batch["input_ids"][2:, 8:], **options), greedy[2:, 8:])


@EVERY
def test_a_batch_with_padding_is_scored_as_one_by_one(family: Family) -> None:
    model = tiny_model(family.model_type, layers=LAYERS)
    draw = torch.Generator().manual_seed(6)
    ids = torch.randint(3, 64, (4, 30), generator=draw).tolist()
    items = [Choices(row[: 8 + 4 * at], [row[20:25], row[25:28]], [1, 1]) for at, row in enumerate(ids)]
    with evaluating(model):
        found = choice_nats(model, items, batch_size=3, pad_id=0, device=CPU)
    for item, nats in zip(items, found, strict=True):
        for continuation, one in zip(item.continuations, nats, strict=True):
            assert one == pytest.approx(naive_nats(model, item.prompt, continuation), abs=2e-4)


_LOADED_ELSEWHERE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
assert not any(name.split(".")[0] == "atp" for name in sys.modules)
for directory in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(directory / "model", trust_remote_code=True)
    assert type(model).__name__ == (directory / "class").read_text(), type(model)
    expected = torch.load(directory / "logits")
    found = model(torch.arange(3, 20)[None]).logits
    assert (found - expected).abs().max() < 1e-4, (directory.name, float((found - expected).abs().max()))
    print(directory.name)
"""


@pytest.mark.slow
def test_widths_per_layer_load_through_the_file_beside_them(tmp_path: Path) -> None:
    """In a process that has no atp: one for all families, as it takes seconds to start."""
    for name, family in FAMILIES.items():
        masked = masked_model(family)
        model = removed_model(masked, random_masks(masked.space, 0.3))
        export_hf(model, None, tmp_path / "all" / name / "model")
        (tmp_path / "all" / name / "class").write_text(type(model).__name__)
        with torch.no_grad():
            torch.save(model(torch.arange(3, 20)[None]).logits, tmp_path / "all" / name / "logits")
    command = [sys.executable, "-c", _LOADED_ELSEWHERE, str(tmp_path / "all")]
    made = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"HF_HOME": str(tmp_path / "hf")})
    assert made.stdout.split() == sorted(FAMILIES), made.stderr[-2000:]


@EVERY
def test_the_live_model_is_cut_exactly_or_says_why_not(family: Family) -> None:
    kinds = tuple(kind for kind in ("heads", "channels") if kind not in family.refused)
    masked = masked_model(family, kinds)
    masks_U = emptied(masked.space, random_masks(masked.space, 0.2))
    if not can_cut_live(masked.space):
        assert "over all heads at once" in why_uncut(masked.space, "binary", taught=False)
        return
    masked.set_masks(masks_U)
    before = logits(masked)
    cut_live(masked, masks_U)
    torch.testing.assert_close(logits(masked), before, atol=1e-4, rtol=0)


@EVERY
def test_soft_gates_fold_into_the_weights(family: Family) -> None:
    masked = masked_model(family, tied=True)
    masks_U = random_masks(masked.space, 0.3)
    gates_U = masks_U * (0.5 + torch.rand(masked.space.num_units, generator=torch.Generator().manual_seed(1)))
    masked.set_masks(gates_U)
    folded = fold(merged_tensors(masked.peft_model), masked.space, gates_U, tied=True)
    small = remove(folded, base_config(masked), masked.space, masks_U)
    assert max_logit_difference(masked, small, [BATCH]) < 1e-4


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_any_architecture_of_any_family_is_removed_exactly(data: st.DataObject) -> None:
    """Attention of every kind, biases, tied or not, any budget, layers without attention or FFN."""
    family = data.draw(st.sampled_from(list(FAMILIES.values())))
    attention = data.draw(st.sampled_from(list(ATTENTION)))
    tied, biased = data.draw(st.booleans()), data.draw(st.booleans())
    kinds = data.draw(st.sets(st.sampled_from(kinds_of(family)), min_size=1))
    seed, sparsity = data.draw(st.integers(0, 999)), data.draw(st.floats(0.02, 0.6))
    model = tiny_model(family.model_type, attention, tied=tied, biased=biased, layers=LAYERS, seed=seed)
    try:
        space = PruningSpace.from_model(model, sorted(kinds))
        scores_U = torch.randn(space.num_units, generator=torch.Generator().manual_seed(seed))
        masks_U = select(space, scores_U, sparsity, min_units={"heads": 0, "channels": 0})
    except UserError:  # no unit of these kinds, or a budget that they cannot meet
        return
    masked = MaskedModel(add_lora(model, r=2), space).eval()
    masked.set_masks(masks_U)
    assert max_logit_difference(masked, removed_model(masked, masks_U), [BATCH]) < 1e-4
