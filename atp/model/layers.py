"""A live decoder layer in the words of the table: its projections by role, the shape of its heads.

Between transformers' modules and the pruning space, which describes a model without knowing how modules and their
attributes are called. Reads modules and, where weights were cut, tells attention what is left. Knows nothing of units,
masks or LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from atp.model.families import FAMILIES, Family, family_of


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer.

    Attributes:
        linears: Its linears by module name, in the order in which the layer has them.
        roles: Module name of each projection that the layer has, by role.
        head_dim: Query and key dimensions of a head; 0 without attention.
        value_dim: Value dimensions of a head.
        rotary_dim: Head size that the rotary frequencies were made for.
        rotary_pairs: Which of its pairs the heads have.
        norms: Modules of the norms of queries and keys that the layer has, by what they normalise.
    """

    linears: Mapping[str, nn.Linear]
    roles: Mapping[str, str]
    head_dim: int
    value_dim: int
    rotary_dim: int
    rotary_pairs: tuple[int, ...]
    norms: Mapping[str, str]

    def linear(self, role: str) -> nn.Linear | None:
        """The projection of a role; None where the layer lacks its block."""
        return self.linears[self.roles[role]] if role in self.roles else None


def layer_parts(family: Family, layer: nn.Module) -> LayerParts:
    """Read a decoder layer of a dense or pruned model, not yet wrapped by PEFT."""
    modules = dict(layer.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    roles = {role: name for role, name in family.linears.items() if name in linears}
    attention: Any = layer.get_submodule(family.attention)
    head_dim = int(attention.head_dim) if "query" in roles else 0
    return LayerParts(
        linears=linears,
        roles=roles,
        head_dim=head_dim,
        value_dim=int(getattr(attention, "value_dim", head_dim)),
        rotary_dim=int(getattr(attention, "rotary_dim", head_dim)),
        rotary_pairs=tuple(getattr(attention, "rotary_pairs", None) or range(head_dim // 2)),
        norms={norm.over: norm.module for norm in family.norms if norm.over != "stream" and norm.module in modules},
    )


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a causal language model, by module name."""
    family = family_of(getattr(model, "config", None))
    return {f"{family.layers}.{index}": layer for index, layer in model.get_submodule(family.layers).named_children()}


def block_parameters(model: nn.Module) -> int:
    """Parameters of the linears of a model's decoder blocks: the denominator of sparsity."""
    linears = (m for layer in decoder_layers(model).values() for m in layer.modules() if isinstance(m, nn.Linear))
    return sum(p.numel() for linear in linears for p in linear.parameters(recurse=False))


def set_group_size(attention: nn.Module, queries_per_kv_head: int) -> None:
    """Tell an attention block whose weights were cut how many query heads share a KV head."""
    module: Any = attention
    module.num_key_value_groups = queries_per_kv_head


def attention_widths(module: nn.Module) -> tuple[int, int] | None:
    """Rows of the query projection and columns of the output projection of an attention block; None for other modules.

    The model may be wrapped: a block is known by the projections it holds.
    """
    children = dict(module.named_children())
    for family in FAMILIES.values():
        names = [family.linears[role].rpartition(".")[2] for role in ("query", "output")]
        if all(name in children for name in names):
            query, output = (children[name] for name in names)
            return int(query.out_features), int(output.in_features)  # type: ignore[arg-type]
    return None
