"""Two-stage criteria against their definitions computed by hand, rankings, and the names that users may give."""

from __future__ import annotations

import pytest
import torch
from conftest import SHAPES, tiny_batch, tiny_model

from atp.cut.selection import select
from atp.masks.generator import FixedScores, GradientScores
from atp.masks.lora import MaskedModel, add_lora
from atp.prepare.criteria import CRITERIA, RANKINGS, importance, lora_gradient, rank
from atp.prepare.importance import standardise
from atp.space.space import PruningSpace

BATCHES = [tiny_batch(seed=1), tiny_batch(seed=2)]


def masked_model(family: str = "llama", attention: str = "gqa", **options: bool) -> MaskedModel:
    model = tiny_model(family, attention, **options)
    space = PruningSpace.from_model(model, ("heads", "channels"))
    return MaskedModel(add_lora(model, r=2), space)


def parts(masked: MaskedModel, layer: int) -> dict[str, torch.Tensor]:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return {n.split(".")[1]: masked.base_weight(f"model.layers.{layer}.{n}").detach() for n in names}


def test_magnitude_is_the_root_mean_square_of_owned_weights() -> None:
    masked = masked_model()
    scores = masked.space.split(importance("magnitude", masked, []))
    w = parts(masked, 1)
    by_hand = torch.cat([w["gate_proj"][4], w["up_proj"][4], w["down_proj"][:, 4]]).square().mean().sqrt()
    torch.testing.assert_close(scores["layers.1.channels"][4], by_hand)
    rows = [w["q_proj"][16:32], w["k_proj"][8:16], w["v_proj"][8:16], w["o_proj"][:, 16:32]]
    by_hand = torch.cat([r.flatten() for r in rows]).square().mean().sqrt()
    torch.testing.assert_close(scores["layers.1.heads"][1], by_hand)


def test_taylor_is_the_sum_of_weight_times_gradient() -> None:
    masked = masked_model()
    scores = masked.space.split(importance("taylor", masked, BATCHES))
    dense = tiny_model("llama", "gqa")
    for batch in BATCHES:
        (dense(**batch).loss / len(BATCHES)).backward()
    mlp = dense.model.layers[0].mlp
    products = {n: (getattr(mlp, n).weight * getattr(mlp, n).weight.grad).abs() for n in ("gate_proj", "up_proj")}
    down = (mlp.down_proj.weight * mlp.down_proj.weight.grad).abs()
    by_hand = products["gate_proj"].sum(1) + products["up_proj"].sum(1) + down.sum(0)
    torch.testing.assert_close(scores["layers.0.channels"], by_hand.detach(), rtol=1e-3, atol=1e-6)
    assert not any(masked.base_weight(w.module).requires_grad for w in masked.space.weights)


def test_wanda_and_fluctuation_read_the_real_positions() -> None:
    masked = masked_model()
    seen: list[torch.Tensor] = []
    hook = masked.linear("model.layers.1.mlp.down_proj").register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        for batch in BATCHES:
            masked(**batch)
    hook.remove()
    x = torch.cat([h[b["attention_mask"].bool()] for h, b in zip(seen, BATCHES, strict=True)])
    weight = masked.base_weight("model.layers.1.mlp.down_proj").detach()
    found = masked.space.split(importance("wanda", masked, BATCHES))["layers.1.channels"]
    torch.testing.assert_close(found, weight.abs().mean(0) * x.norm(dim=0), rtol=1e-4, atol=1e-5)
    found = masked.space.split(importance("fluctuation", masked, BATCHES))["layers.1.channels"]
    metric = weight.square().sum(0) * x.var(0, unbiased=False)
    torch.testing.assert_close(found, metric / metric.std(), rtol=1e-3, atol=1e-5)


def test_fluctuation_standardises_dimensions_before_heads_take_their_mean() -> None:
    """FLAP's code: squared for attention, standardised over all inputs of the projection, then averaged over a head."""
    masked = masked_model()
    seen: list[torch.Tensor] = []
    hook = masked.linear("model.layers.0.self_attn.o_proj").register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    with torch.no_grad():
        for batch in BATCHES:
            masked(**batch)
    hook.remove()
    x = torch.cat([h[b["attention_mask"].bool()] for h, b in zip(seen, BATCHES, strict=True)]).double()
    weight = masked.base_weight("model.layers.0.self_attn.o_proj").detach().double()
    metric = (weight.square().sum(0) * x.var(0, unbiased=False)).square()
    standard = (metric - metric.mean()) / metric.std()
    found_U = rank("centred", masked.space, importance("fluctuation", masked, BATCHES))
    by_hand = standard.view(3, -1).mean(1)  # three KV heads, each with the dimensions of its query heads
    torch.testing.assert_close(masked.space.split(found_U)["layers.0.heads"].double(), by_hand, rtol=1e-3, atol=1e-5)


def test_lora_gradient_equals_its_formula() -> None:
    masked = masked_model()
    torch.manual_seed(0)
    for name, parameter in masked.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1)
    masked(**BATCHES[0]).loss.backward()
    scores = masked.space.split(lora_gradient(masked))
    by_hand = torch.zeros(20)
    for name, dim in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
        factors = masked.adapter(f"model.layers.0.mlp.{name}")
        assert factors is not None
        a, b, scale = factors
        gradient = b.grad @ a + b @ a.grad - b.grad @ a.grad
        unit = (gradient * (masked.base_weight(f"model.layers.0.mlp.{name}") + scale * b @ a)).abs().sum(dim)
        by_hand += (unit / unit.norm()).detach()
    torch.testing.assert_close(scores["layers.0.channels"], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", [*CRITERIA, "taylor+wanda"])
def test_a_dead_unit_goes_first_and_nothing_is_left_changed(criterion: str) -> None:
    masked = masked_model()
    for name in ("gate_proj", "up_proj"):
        masked.base_weight(f"model.layers.0.mlp.{name}").data[3] = 0.0
    masked.base_weight("model.layers.0.mlp.down_proj").data[:, 3] = 0.0
    before = {n: p.clone() for n, p in masked.named_parameters()}
    masked.train()
    found_U = importance(criterion, masked, BATCHES, seed=1)
    assert found_U.shape == (masked.space.num_units,) and bool((found_U >= 0).all())
    if criterion == "random":
        assert torch.equal(found_U, importance(criterion, masked, BATCHES, seed=1))
        assert not torch.equal(found_U, importance(criterion, masked, BATCHES, seed=2))
    else:
        assert int(masked.space.split(found_U)["layers.0.channels"].argmin()) == 3
    assert masked.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in masked.named_parameters())


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
def test_every_criterion_ranks_every_shape(family: str, attention: str, tied: bool, biased: bool) -> None:
    masked = masked_model(family, attention, tied=tied, biased=biased)
    for criterion in ("taylor", "wanda", "fluctuation", "magnitude"):
        for ranking in RANKINGS:
            scores_U = rank(ranking, masked.space, importance(criterion, masked, BATCHES[:1]))
            reached = float(masked.space.sparsity(select(masked.space, scores_U, 0.25).double()))
            assert 0.2 < reached <= 0.25


def test_rankings_order_as_they_say() -> None:
    masked = masked_model()
    importance_U = torch.rand(masked.space.num_units) + 1e-3
    by_axis = masked.space.split(importance_U)
    by_axis["layers.1.channels"] *= 1e6
    assert torch.equal(rank("global", masked.space, importance_U).argsort(), importance_U.argsort())
    for ranking in ("layer", "zscore"):
        for name, values in masked.space.split(rank(ranking, masked.space, importance_U)).items():
            assert torch.equal(values.argsort(), by_axis[name].argsort())
            assert abs(float(values.mean())) < 1e-4


def test_gradient_scores_are_ranks_of_a_running_mean() -> None:
    space = masked_model().space
    generator = GradientScores(space, decay=0.5)
    first, second = torch.rand(space.num_units), torch.rand(space.num_units)
    generator.observe(first)
    generator.observe(second)
    torch.testing.assert_close(generator.mean_U, 0.25 * first + 0.5 * second)
    for name, values in space.split(generator()).items():
        assert torch.equal(values.argsort(), space.split(generator.mean_U)[name].argsort())
        assert float(values.max()) == pytest.approx(0.5 - 0.5 / values.numel())
    with pytest.raises(ValueError, match=r"decay is 1"):
        GradientScores(space, decay=1.0)


def test_fixed_scores_take_over_the_verdict() -> None:
    space = masked_model().space
    generator = FixedScores(space)
    scores_U = torch.randn(space.num_units)
    generator.warm_start(scores_U)
    assert torch.equal(generator(), scores_U)
    assert not list(generator.parameters())


def test_protected_layers_keep_everything() -> None:
    model = tiny_model("llama", "gqa", layers=4)
    space = PruningSpace.from_model(model, ("heads", "channels"), protect=[0, -1])
    assert {axis.layer for axis in space.axes} == {1, 2}
    for shape in ("per_layer", "uniform"):
        masks_U = select(space, torch.randn(space.num_units), 0.3, shape=shape)
        assert 0.25 < float(space.sparsity(masks_U.double())) <= 0.3
    with pytest.raises(ValueError, match=r"protect_layers holds 4.*from -4 to 3"):
        PruningSpace.from_model(model, ("heads", "channels"), protect=[4])


def test_joined_criteria_are_the_mean_of_their_standardised_logarithms() -> None:
    masked = masked_model()
    both, *alone = (importance(name, masked, BATCHES) for name in ("taylor+wanda", "taylor", "wanda"))
    mean = sum(standardise(masked.space, one) for one in alone) / 2
    torch.testing.assert_close(both.log(), mean, rtol=1e-4, atol=1e-5)


def test_unknown_names_are_refused() -> None:
    masked = masked_model()
    with pytest.raises(ValueError, match=r"criterion is 'hessian'; known: fisher"):
        importance("taylor+hessian", masked, BATCHES)
    with pytest.raises(ValueError, match=r"criterion is 'hessian'; known: fisher"):
        importance("hessian", masked, BATCHES)
    with pytest.raises(ValueError, match=r"ranking is 'none'; known: layer"):
        rank("none", masked.space, torch.rand(masked.space.num_units))
    with pytest.raises(ValueError, match=r"taylor is measured on training batches"):
        importance("taylor", masked, [])
