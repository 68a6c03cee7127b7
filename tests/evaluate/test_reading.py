"""Packed rows, portions and dropped rows against one sequence at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_evaluate import CPU, FAMILIES, VOCABULARY, naive_nats
from transformers import PreTrainedModel

from atp.data.encoding import Choices
from atp.evaluate import reading, scoring
from atp.evaluate.reading import Reader
from atp.evaluate.scoring import choice_nats, evaluating, greedy


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return FAMILIES[request.param]()


def choice_items(prefix: list[int]) -> list[Choices]:
    """Prompts after a prefix, with choices of 0 to 9 tokens, of which some begin alike."""
    draw = random.Random(6)

    def ids(size: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(size)]

    sizes = [(1, 4, 9), (5, 5), (2, 1, 3, 8, 6), (7,), (0, 2), (3, 1), (9, 9, 9)]
    items = [
        Choices([*prefix, *ids(1 + 2 * at)], [ids(n) for n in each], [1] * len(each)) for at, each in enumerate(sizes)
    ]
    items[1].continuations[1][:3] = items[1].continuations[0][:3]
    return items


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("shared", [0, 20])
def test_choices_in_one_row_score_as_one_by_one(
    model: PreTrainedModel, shared: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a row holds only some of an item's choices, and where many prompts begin alike."""
    items = choice_items(list(range(3, 3 + shared)))
    for room in (256, 10):
        monkeypatch.setattr(scoring, "_PACK", room)
        with evaluating(model):
            found = choice_nats(model, items, batch_size=batch_size, pad_id=0, device=CPU)
        for item, nats in zip(items, found, strict=True):
            for continuation, one in zip(item.continuations, nats, strict=True):
                assert one == pytest.approx(naive_nats(model, item.prompt, continuation), abs=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_attention_that_follows_any_mask_reads_all_choices_of_an_item_as_one_row(attention: str) -> None:
    model = tiny_model(vocabulary=VOCABULARY)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    model.config._attn_implementation = attention
    assert Reader(model, 0, CPU).packs == (attention != "flex_attention")
    if attention == "flex_attention":
        return  # it compiles for every shape
    item = choice_items([5, 6])[2]
    found = choice_nats(model, [item], batch_size=8, pad_id=0, device=CPU)[0]
    assert rows == [1, 1]
    expected = [naive_nats(model, item.prompt, ids) for ids in item.continuations]
    for one, nats in zip(found, expected, strict=True):
        assert one == pytest.approx(nats, abs=2e-4)


def test_portions_and_finished_texts_change_no_text(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts read in portions are decoded together; a text that ended is no longer read."""
    prompts = [item.prompt for item in choice_items([1, 9])]
    how: dict[str, Any] = {"max_new_tokens": 20, "pad_id": 0, "device": CPU}
    with evaluating(model):
        alone = [greedy(model, [one], stops=[], batch_size=1, **how)[0] for one in prompts]
        stops = sorted({ids[2] for ids in alone[:5]})
        cut = [ids[: min((at for at, token in enumerate(ids) if token in stops), default=20)] for ids in alone]
        monkeypatch.setattr(reading, "_TOKENS_AT_ONCE_ON_CPU", 30)
        rows: list[int] = []
        model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
        assert greedy(model, prompts, stops=[], batch_size=8, **how) == alone
        if Reader(model, 0, CPU).packs:
            assert rows[0] < len(prompts) and rows[-1] == len(prompts)
        assert greedy(model, prompts, stops=stops, batch_size=8, **how) == cut
        middle, longest = sorted(map(len, cut))[len(cut) // 2], max(map(len, cut))
        assert rows[-1] < len(prompts) or longest - middle < 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_scores_and_writes_as_one_by_one(model: PreTrainedModel) -> None:
    device, items = torch.device("cuda"), choice_items([1, 9])
    expected = [[naive_nats(model, item.prompt, ids) for ids in item.continuations] for item in items]
    model.to(device)  # type: ignore[arg-type]
    how: dict[str, Any] = {"pad_id": 0, "device": device}
    prompts = [item.prompt for item in items]
    with evaluating(model):
        for nats, wanted in zip(choice_nats(model, items, batch_size=16, **how), expected, strict=True):
            for one, ours in zip(nats, wanted, strict=True):
                assert one == pytest.approx(ours, abs=5e-3)
        how |= {"stops": [], "max_new_tokens": 8}
        alone = [greedy(model, [one], batch_size=1, **how)[0] for one in prompts]
        assert greedy(model, prompts, batch_size=8, **how) == alone
