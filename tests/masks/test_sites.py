"""The figure in ``atp.masks``: where the masks of a decoder layer multiply is where the space puts its sites."""

from __future__ import annotations

import re

import pytest
from conftest import tiny_model

import atp.masks
from atp.space.space import PruningSpace

NUMBERS = {
    ("q_proj", "output"): 1,
    ("k_proj", "output"): 1,
    ("v_proj", "output"): 2,
    ("o_proj", "input"): 3,
    ("down_proj", "input"): 4,
    ("o_proj", "output"): 5,
    ("down_proj", "output"): 5,
    ("embed_tokens", "output"): 5,
}


def numbers_of(*kinds: str) -> dict[int, set[str]]:
    """The figure's numbers of the places where masks of these kinds act, each with the kinds that it masks."""
    found: dict[int, set[str]] = {}
    for module, side, on in (site.cheapest for site in PruningSpace.from_model(tiny_model(), kinds).sites):
        number = NUMBERS[module.rpartition(".")[2], on]
        found.setdefault(number, set()).update(factor.axis.kind for factor in side.factors)
    return found


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("heads", "channels"), {2: {"heads"}, 4: {"channels"}}),
        (("heads", "value_dims"), {2: {"heads", "value_dims"}}),
        (("heads", "query_heads"), {3: {"heads", "query_heads"}}),
        (("heads", "query_heads", "value_dims"), {3: {"heads", "query_heads", "value_dims"}}),
        (("qk_pairs",), {1: {"qk_pairs"}}),
        (("hidden",), {5: {"hidden"}}),
    ],
)
def test_masks_act_where_the_figure_says(kinds: tuple[str, ...], expected: dict[int, set[str]]) -> None:
    assert numbers_of(*kinds) == expected


def test_the_figure_names_every_place() -> None:
    lines = re.findall(r"^    \[(\d)\] (output|input) of (.*?)  ", atp.masks.__doc__ or "", re.MULTILINE)
    named = {(module, on): int(number) for number, on, modules in lines for module in re.findall(r"\w+_proj", modules)}
    assert named | {("embed_tokens", "output"): 5} == NUMBERS
    drawn = (atp.masks.__doc__ or "").partition("[1] output")[0]
    assert {int(number) for number in re.findall(r"\[(\d)\]", drawn)} == set(NUMBERS.values())
