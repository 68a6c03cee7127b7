"""Pruned architectures against dense models whose removed units are zeroed by hand."""

import copy
import json
from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

from atp.model import modeling_atp
from atp.model.families import family_of, is_stock
from atp.model.widths import LayerWidths, build_model, layer_widths, pruned_config

LAYERS, HIDDEN, CHANNELS, VOCAB = 4, 32, 24, 61
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    """A dense base model. Head counts are such that dropping a KV head leaves counts that do not divide HIDDEN."""

    model_type: str
    kv_heads: int
    queries: int  # query heads per KV head
    options: dict = field(default_factory=dict)

    def config(self) -> PreTrainedConfig:
        heads = self.kv_heads * self.queries
        return AutoConfig.for_model(
            self.model_type,
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=CHANNELS,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=[2, 3],
            pad_token_id=0,
            **({"head_dim": HIDDEN // heads} | self.options),
        )


CASES = {
    "llama-mha": Case("llama", 4, 1),
    "llama-gqa-tied-rope3": Case("llama", 4, 2, {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-mqa-biases": Case("llama", 1, 4, {"attention_bias": True, "mlp_bias": True}),
    "llama-gqa-biases": Case("llama", 4, 2, {"attention_bias": True}),
    "mistral-gqa": Case("mistral", 4, 2, {"sliding_window": None, "head_dim": 6}),
    "mistral-mha-tied-window": Case("mistral", 4, 1, {"sliding_window": 4, "tie_word_embeddings": True}),
    "qwen2-gqa": Case("qwen2", 4, 2),
    "qwen2-mha-tied-window": Case(
        "qwen2",
        4,
        1,
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3-mqa-tied": Case("qwen3", 1, 4, {"tie_word_embeddings": True, "head_dim": 6}),
    "qwen3-gqa-biases": Case("qwen3", 4, 2, {"attention_bias": True}),
    "qwen3-gqa-untied": Case("qwen3", 4, 2),
}

# What a layer keeps: (fraction of KV heads, fraction of the queries of each, channels).
FULL = (1.0, 1.0, CHANNELS)
SHAPES = {
    "dense": [FULL] * LAYERS,
    "uniform": [(1.0, 0.5, 7)] * LAYERS,
    "uniform-not-dividing": [(0.75, 1.0, 7)] * LAYERS,
    "per-layer": [FULL, (0.75, 1.0, 5), (0.25, 0.5, 24), (1.0, 1.0, 1)],
    "no-attention-first": [(0, 0, 9), FULL, (0.5, 1.0, 5), FULL],
    "no-attention-middle": [FULL, (0, 0, 9), FULL, (0.5, 1.0, 5)],
    "no-attention-last": [FULL, FULL, (0.5, 1.0, 5), (0, 0, 9)],
    "no-ffn": [(1.0, 1.0, 0), FULL, (0.5, 0.5, 0), FULL],
    "empty-layer": [FULL, (0, 0, 0), (0.5, 1.0, 5), (0, 0, 0)],
    "no-attention-at-all": [(0, 0, 9), (0, 0, 5), (0, 0, 0), (0, 0, 7)],
}


def dense_model(case: Case) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.25)
    return model


def kept_units(case: Case, shape: list) -> list[tuple[list[int], list[int], list[int]]]:
    """KV heads, query heads and channels that each layer keeps, neither the first nor the last of them by rule."""
    kept = []
    for index, (kv_fraction, query_fraction, channels) in enumerate(shape):
        generator = torch.Generator().manual_seed(index)
        kv_count = max(1, round(case.kv_heads * kv_fraction)) if kv_fraction else 0
        query_count = max(1, round(case.queries * query_fraction))
        kv_heads = sorted(torch.randperm(case.kv_heads, generator=generator)[:kv_count].tolist())
        heads = [
            kv_head * case.queries + query
            for kv_head in kv_heads
            for query in sorted(torch.randperm(case.queries, generator=generator)[:query_count].tolist())
        ]
        kept.append((kv_heads, heads, sorted(torch.randperm(CHANNELS, generator=generator)[:channels].tolist())))
    return kept


def widths_of(case: Case, shape: list) -> list[LayerWidths]:
    head_dim = case.config().head_dim
    return [LayerWidths(len(h), len(k), head_dim, len(c)) for k, h, c in kept_units(case, shape)]


def dims(heads: list[int], head_dim: int) -> list[int]:
    return [head * head_dim + dim for head in heads for dim in range(head_dim)]


def zeroed(model: PreTrainedModel, case: Case, shape: list) -> PreTrainedModel:
    """The dense model with the removed units' outputs set to zero, and all of a block's output if it is gone."""
    model = copy.deepcopy(model)
    head_dim = model.config.head_dim
    with torch.no_grad():
        for layer, (_, heads, channels) in zip(model.model.layers, kept_units(case, shape), strict=True):
            outputs = (
                (layer.self_attn.o_proj, dims(heads, head_dim)),
                (layer.mlp.down_proj, channels),
            )
            for projection, kept in outputs:
                mask = torch.zeros(projection.in_features)
                mask[kept] = 1
                projection.weight.mul_(mask)
                if not kept and projection.bias is not None:
                    projection.bias.zero_()
    return model


def sliced_tensors(model: PreTrainedModel, case: Case, shape: list) -> dict[str, torch.Tensor]:
    """The dense model's tensors cut to the kept units, names unchanged."""
    head_dim = model.config.head_dim
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    for index, (kv_heads, heads, channels) in enumerate(kept_units(case, shape)):
        rows = {
            "self_attn.q_proj": dims(heads, head_dim),
            "self_attn.k_proj": dims(kv_heads, head_dim),
            "self_attn.v_proj": dims(kv_heads, head_dim),
            "mlp.gate_proj": channels,
            "mlp.up_proj": channels,
        }
        columns = {"self_attn.o_proj": dims(heads, head_dim), "mlp.down_proj": channels}
        for name, tensor in model.model.layers[index].state_dict().items():
            module = name.rpartition(".")[0]
            attention = name.startswith(("self_attn.", "input_layernorm."))
            if not (heads if attention else channels):
                continue
            if module in rows:
                tensor = tensor[rows[module]]
            elif module in columns and tensor.dim() == 2:
                tensor = tensor[:, columns[module]]
            tensors[f"model.layers.{index}.{name}"] = tensor
    return tensors


def pruned_model(dense: PreTrainedModel, case: Case, shape: list) -> PreTrainedModel:
    config = pruned_config(dense.config, widths_of(case, shape))
    model = build_model(config, dtype=torch.float32)
    model.load_state_dict(sliced_tensors(dense, case, shape), strict=True)
    return model


def left_padded_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(4, VOCAB, (3, 11))
    attention_mask = torch.ones_like(input_ids)
    for row, padding in enumerate((0, 3, 8)):
        input_ids[row, :padding] = 0
        attention_mask[row, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def real_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_pruned_model_computes_what_the_zeroed_dense_model_computes(case, shape):
    dense = dense_model(case)
    model = pruned_model(dense, case, shape)
    batch = left_padded_batch()
    expected = real_logits(zeroed(dense, case, shape), batch)
    torch.testing.assert_close(real_logits(model, batch), expected, atol=1e-5, rtol=0)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(real_logits(model, batch), expected, atol=1e-5, rtol=0)


GENERATING = [
    ("llama-mha", "no-attention-first"),
    ("llama-gqa-tied-rope3", "per-layer"),
    ("llama-mqa-biases", "no-attention-at-all"),
    ("mistral-gqa", "empty-layer"),
    ("mistral-mha-tied-window", "no-attention-first"),
    ("qwen2-gqa", "no-ffn"),
    ("qwen2-mha-tied-window", "no-attention-first"),
    ("qwen3-mqa-tied", "no-attention-first"),
    ("qwen3-gqa-biases", "no-attention-middle"),
]


@pytest.mark.parametrize(("case", "shape"), GENERATING)
def test_generation_with_a_cache_equals_generation_without(case, shape):
    model = pruned_model(dense_model(CASES[case]), CASES[case], SHAPES[shape])
    batch = left_padded_batch()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(model.generate(**batch, **options), greedy)
    assert torch.equal(model.generate(**batch, **options, cache_implementation="static"), greedy)
    beams = model.generate(**batch, **options, num_beams=3, use_cache=False)
    assert torch.equal(model.generate(**batch, **options, num_beams=3), beams)
    alone = model.generate(batch["input_ids"][2:, 8:], **options)
    assert torch.equal(alone, greedy[2:, 8:]), "padding on the left changes the text"


@pytest.mark.parametrize(("case", "shape"), GENERATING[::2])
def test_generation_with_a_static_cache_equals_generation_without(case, shape):
    model = pruned_model(dense_model(CASES[case]), CASES[case], SHAPES[shape])
    options = {**left_padded_batch(), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options, cache_implementation="static", disable_compile=True), expected)


def test_stepping_by_hand_with_a_cache_equals_one_pass():
    """No generate() here to count positions: the model itself must know how many tokens the cache holds."""
    case = CASES["llama-mha"]
    model = pruned_model(dense_model(case), case, SHAPES["no-attention-first"])
    tokens = left_padded_batch()["input_ids"][:1]
    with torch.no_grad():
        whole = model(tokens).logits
        cache, steps = None, []
        for part in tokens.split([4, 1, 3, 3], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert cache.get_seq_length() == tokens.shape[1]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)


def test_the_attention_kernel_can_be_changed_on_a_loaded_model():
    case = CASES["llama-mha"]
    model = pruned_model(dense_model(case), case, SHAPES["no-attention-first"])
    batch = left_padded_batch()
    model.set_attn_implementation("eager")  # the only kernel that returns attention weights
    attentions = model(**batch, output_attentions=True).attentions
    assert [weights.shape[1] for weights in attentions] == [4, 2, 4]
    assert attentions[0].sum(-1)[batch["attention_mask"].bool()[:, None].expand(-1, 4, -1)].allclose(torch.ones(()))


@pytest.mark.parametrize("shape", ["per-layer", "empty-layer"])
def test_gradient_checkpointing_gives_the_same_gradients(shape):
    case = CASES["llama-gqa-tied-rope3"]
    model = pruned_model(dense_model(case), case, SHAPES[shape]).train()
    batch = left_padded_batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("case", "shape"),
    [("llama-mha", "uniform-not-dividing"), ("llama-gqa-biases", "empty-layer"), ("qwen2-gqa", "no-attention-first")],
)
def test_lora_wraps_and_trains_a_pruned_model(case, shape):
    case = CASES[case]
    model = pruned_model(dense_model(case), case, SHAPES[shape])
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    batch = left_padded_batch()
    optimizer = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = lora(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted = real_logits(lora, batch)
    torch.testing.assert_close(real_logits(lora.merge_and_unload(), batch), adapted, atol=1e-5, rtol=0)


STOCK_CLASSES = [
    ("llama-mha", "uniform", "llama"),
    ("llama-gqa-tied-rope3", "uniform", "llama"),
    ("llama-mha", "uniform-not-dividing", "mistral"),
    ("llama-gqa-tied-rope3", "uniform-not-dividing", "mistral"),
    ("llama-gqa-biases", "uniform", "llama"),
    ("llama-gqa-biases", "uniform-not-dividing", "atp_llama"),
    ("mistral-gqa", "uniform-not-dividing", "mistral"),
    ("qwen2-gqa", "uniform-not-dividing", "qwen2"),
    ("qwen3-gqa-biases", "uniform-not-dividing", "qwen3"),
    ("mistral-gqa", "per-layer", "atp_mistral"),
    ("qwen2-gqa", "no-ffn", "atp_qwen2"),
    ("qwen3-mqa-tied", "no-attention-at-all", "atp_qwen3"),
]


@pytest.mark.parametrize(("case", "shape", "model_type"), STOCK_CLASSES)
def test_one_size_for_all_layers_gives_a_stock_class_where_one_can_hold_it(case, shape, model_type):
    case = CASES[case]
    config = pruned_config(case.config(), widths_of(case, SHAPES[shape]))
    assert config.model_type == model_type
    assert is_stock(config) == (not model_type.startswith("atp_"))
    assert family_of(config).model_type == model_type.removeprefix("atp_")
    assert layer_widths(config) == widths_of(case, SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_config_keeps_everything_but_the_widths_through_json(case, shape, tmp_path):
    modeling_atp.register()
    base = case.config()
    base.dtype = torch.bfloat16
    before = base.to_json_string(use_diff=False)
    config = pruned_config(base, widths_of(case, shape))
    assert base.to_json_string(use_diff=False) == before, "the base config was changed"
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert layer_widths(reloaded) == widths_of(case, shape)
    kept = ["rope_parameters", "tie_word_embeddings", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"]
    kept += ["hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "head_dim"]
    kept += [
        name for name in ("attention_bias", "mlp_bias", "layer_types") if config.model_type.endswith(case.model_type)
    ]
    for name in kept:
        if hasattr(base, name):
            assert getattr(reloaded, name) == getattr(base, name), name
    assert getattr(reloaded, "sliding_window", None) == getattr(base, "sliding_window", None)


def test_nothing_cut_leaves_the_config_as_it_was():
    base = CASES["llama-gqa-tied-rope3"].config()
    config = pruned_config(base, layer_widths(base))
    assert config == base
    assert config is not base


def test_only_layers_that_differ_are_written_to_per_layer_config():
    case = CASES["llama-gqa-biases"]
    config = pruned_config(case.config(), widths_of(case, SHAPES["no-attention-middle"]))
    written = json.loads(config.to_json_string())["per_layer_config"]
    assert written == {
        "1": {"num_attention_heads": 0, "num_key_value_heads": 0, "intermediate_size": 9, "skip": ["attention"]},
        "3": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 5},
    }


def test_a_pruned_model_can_be_pruned_again():
    case = CASES["qwen2-gqa"]
    once = pruned_config(case.config(), widths_of(case, SHAPES["per-layer"]))
    smaller = [LayerWidths(w.num_attention_heads, w.num_key_value_heads, w.head_dim, 1) for w in layer_widths(once)]
    assert layer_widths(pruned_config(once, smaller)) == smaller
    same = [LayerWidths(1, 1, smaller[0].head_dim, 1)] * LAYERS
    assert pruned_config(once, same).model_type == "qwen2"


def test_parameters_of_absent_blocks_do_not_exist():
    case = CASES["qwen3-gqa-biases"]
    model = build_model(pruned_config(case.config(), widths_of(case, SHAPES["empty-layer"])), dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if name.startswith(("model.layers.1.", "model.layers.3."))]
    assert [name for name in names if name.startswith("model.layers.2.self_attn.q_norm")]


def test_initialized_model_has_finite_weights_of_the_given_type():
    case = CASES["mistral-gqa"]
    config = pruned_config(case.config(), widths_of(case, SHAPES["no-ffn"]))
    before = config.to_json_string()
    model = build_model(config, dtype=torch.bfloat16, initialize=True)
    assert config.to_json_string() == before, "building a model changed the config"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert build_model(config, dtype=torch.bfloat16, device="meta").lm_head.weight.is_meta


def test_unknown_family_is_refused_with_the_supported_ones():
    with pytest.raises(ValueError, match=r"model_type='gpt2'.*llama, mistral, qwen2, qwen3"):
        pruned_config(GPT2Config(), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda widths: widths[:-1], "3 layers, but the base model has 4"),
        (lambda widths: [*widths[:-1], LayerWidths(8, 4, 4, 25)], "layer 3: intermediate_size=25 is larger"),
        (lambda widths: [LayerWidths(10, 5, 4, 24), *widths[1:]], "layer 0: num_attention_heads=10 is larger"),
        (lambda widths: [LayerWidths(4, 2, 2, 24), *widths[1:]], "layer 0: head_dim=2 differs"),
    ],
)
def test_widths_that_do_not_fit_the_base_are_refused(change, message):
    base = CASES["llama-gqa-biases"].config()
    with pytest.raises(ValueError, match=message):
        pruned_config(base, change(layer_widths(base)))


@pytest.mark.parametrize("widths", [(3, 2, 8, 4), (2, 0, 8, 4), (0, 1, 8, 4), (2, 1, 0, 4), (2, 1, 8, -1)])
def test_impossible_layer_widths_are_refused(widths):
    with pytest.raises(ValueError, match="head"):
        LayerWidths(*widths)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"skip": ["self_attn"]}, r"layer 1: skip holds \['self_attn'\]"),
        ({"num_attention_heads": 3}, "layer 1: num_attention_heads=3 must be a positive multiple"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "must list 'attention' in its skip"),
        ({"intermediate_size": 0}, "must list 'mlp' in its skip"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_when_it_is_read(override, message):
    fields = {**CASES["llama-gqa-biases"].config().to_dict(), "per_layer_config": {"1": override}}
    fields.pop("model_type")
    with pytest.raises(ValueError, match=message):
        modeling_atp.AtpLlamaConfig(**fields)
