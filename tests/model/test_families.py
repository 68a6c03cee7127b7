"""The table of families: every row is what transformers has, and a new row is enough for a new family."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, SeedOssConfig, SeedOssForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.models.seed_oss.modeling_seed_oss import SeedOssDecoderLayer, SeedOssModel

import atp
from atp.cut.removal import config_after, max_logit_difference, remove, slice_tensors
from atp.errors import UserError
from atp.export.gguf.layout import gguf_architecture
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import export_hf
from atp.masks.lora import MaskedModel, add_lora
from atp.masks.merging import merged_tensors
from atp.model import modeling_atp
from atp.model.families import ADDING_PAGE, ALWAYS, FAMILIES, ROLES, Family, StockClass, family_of
from atp.model.layers import attention_widths, decoder_layers, layer_parts
from atp.space.space import PruningSpace

PACKAGE = Path(atp.__file__).parent


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
class TestRows:
    def built(self, family: Family, **fields: bool) -> PreTrainedModel:
        sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = AutoConfig.for_model(family.model_type, **sizes, **heads, **tokens, **fields)
        return AutoModelForCausalLM.from_config(config)

    def test_every_module_is_there_and_no_linear_is_forgotten(self, family: Family) -> None:
        model = self.built(family)
        ((_, layer),) = decoder_layers(model).items()
        modules = dict(layer.named_modules())
        linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
        assert linears == set(family.linears.values()) and set(family.linears) == set(ROLES)
        assert {name for name in modules if "norm" in name} == {norm.module for norm in family.norms}
        for name in (family.embeddings, family.final_norm, family.head):
            assert model.get_submodule(name).weight.shape[-1] == 32
        assert family.activation_of(model.config) in family.activations
        assert attention_widths(layer.get_submodule(family.attention)) == (32, 32)
        assert attention_widths(layer.get_submodule(family.mlp)) is None

    def test_biases_are_where_the_config_puts_them(self, family: Family) -> None:
        switches = {name for name in family.biases.values() if name != ALWAYS}
        for fields in ({}, *({name: True} for name in switches)):
            model = self.built(family, **fields)
            ((_, layer),) = decoder_layers(model).items()
            parts = layer_parts(family, layer)
            for role in ROLES:
                linear = parts.linear(role)
                assert linear is not None
                assert (linear.bias is not None) == family.has_bias(model.config, role), (role, fields)

    def test_its_form_with_widths_per_layer_exists(self, family: Family) -> None:
        assert modeling_atp.CONFIG_CLASSES[family.per_layer_type].model_type == family.per_layer_type
        assert len(modeling_atp.CONFIG_CLASSES) == len(FAMILIES)
        assert [of.config_class for of in modeling_atp.BASE_CLASSES] == [*modeling_atp.CONFIG_CLASSES.values()]

    def test_gguf_names_the_architecture_of_the_row(self, family: Family) -> None:
        config = self.built(family).config
        assert gguf_architecture(config, uniform=True) == family.gguf[0]
        config.tie_word_embeddings = True
        assert gguf_architecture(config, uniform=False) == family.gguf[1]


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UserError, match="model_type='gpt2' is not supported: ATP prunes llama, mistral"):
        family_of(AutoConfig.for_model("gpt2"))


def test_norms_that_store_the_distance_from_one_are_scaled_as_norms() -> None:
    model = tiny_model("qwen3")
    plain = PruningSpace.from_model(model, ("hidden", "qk_pairs"))
    masks_U = torch.ones(plain.num_units)
    masks_U[::3] = 0.0
    expected = dict(slice_tensors(model.state_dict().items(), plain, masks_U))
    moved = PruningSpace.from_model(model, ("hidden", "qk_pairs"))
    moved.family = dataclasses.replace(moved.family, norm_offset=1.0)
    norms = {name for name in expected if "norm" in name}
    stored = {name: tensor - 1.0 if name in norms else tensor for name, tensor in model.state_dict().items()}
    for name, tensor in slice_tensors(stored.items(), moved, masks_U):
        torch.testing.assert_close(tensor + 1.0 if name in norms else tensor, expected[name])
    assert config_after(model.config, plain, masks_U).hidden_size < model.config.hidden_size


NAMES = (
    {
        part
        for family in FAMILIES.values()
        for name in (*family.linears.values(), *(norm.module for norm in family.norms), family.layers, family.head)
        for part in (name, name.rpartition(".")[2])
    }
    | {"embed_tokens", *FAMILIES}
) - {"layers", "norm", "mlp"}  # words that mean other things as well
STANDALONE = {"export/verify/engines.py", "export/verify/probe.py"}  # run without atp, as a user's process does
DEFAULTS = {"config/schema.py"}  # the default of lora.target_modules, which users read and override
LLAMA_ONLY = {"embedded/growth.py", "embedded/pretrain.py"}  # make the shipped base, which is a Llama
OTHERS_NAMES = {"export/gguf"}  # llama.cpp's names of architectures and vocabularies


def named_in_code(path: Path) -> set[str]:
    """Strings and attributes of a file's code that are names of the table; docstrings do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            found |= {name for name in NAMES if node.value.strip(".") == name}
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            found.add(node.attr)
    return found


def test_only_the_model_room_knows_the_names() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(("model/", *OTHERS_NAMES)) or name in STANDALONE | DEFAULTS | LLAMA_ONLY:
            continue
        assert not named_in_code(path), name


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[PreTrainedModel]:
    """A model of a family that is in no table, once its row and its classes are added as the page says."""
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "bos_token_id": 1, "eos_token_id": 2}
    config = SeedOssConfig(**sizes, **heads, pad_token_id=0, attention_bias=True, attention_out_bias=False)
    with pytest.raises(UserError, match="model_type='seed_oss' is not supported"):
        family_of(config)
    biases = {**dict.fromkeys(("query", "key", "value"), "attention_bias"), "output": "attention_out_bias"}
    row = Family("seed_oss", stock=(StockClass("seed_oss"),), gguf=("seed_oss", "seed_oss"), biases=biases)
    monkeypatch.setitem(FAMILIES, "seed_oss", row)

    own, base, causal = modeling_atp.per_layer(SeedOssConfig, SeedOssModel, SeedOssForCausalLM, SeedOssDecoderLayer)
    monkeypatch.setattr(modeling_atp, "BASE_CLASSES", (*modeling_atp.BASE_CLASSES, base))
    monkeypatch.setattr(modeling_atp, "MODEL_CLASSES", (*modeling_atp.MODEL_CLASSES, causal))
    monkeypatch.setitem(modeling_atp.CONFIG_CLASSES, "atp_seed_oss", own)
    torch.manual_seed(0)
    yield SeedOssForCausalLM(config).eval()
    for mapping in (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        mapping._extra_content.pop("atp_seed_oss", None)
        mapping._extra_content.pop(own, None)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_family_is_added_as_the_page_says(toy: PreTrainedModel, uniform: bool, tmp_path: Path) -> None:
    steps = re.findall(r"^(\d+)\. ", (PACKAGE.parent / ADDING_PAGE).read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, 11))
    space = PruningSpace.from_model(toy, ("heads", "channels", "hidden"))
    masks_U = torch.ones(space.num_units)
    for axis in space.axes:
        masks_U[axis.offset : axis.offset + axis.size // (3 if uniform or axis.layer < 1 else 2)] = 0.0
    config = toy.config
    masked = MaskedModel(add_lora(toy, r=2), space).eval()
    masked.set_masks(masks_U)
    removed = remove(merged_tensors(masked.peft_model), config, space, masks_U)
    assert type(removed).__name__ == ("SeedOssForCausalLM" if uniform else "AtpSeedOssForCausalLM")
    export_hf(removed, None, tmp_path / "model")
    assert max_logit_difference(masked, load_exported(tmp_path / "model"), [tiny_batch()]) < 1e-5
