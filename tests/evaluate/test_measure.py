"""Costs against arithmetic by hand, and a clock that the test turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SHAPES, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, PreTrainedModel

from atp.evaluate import measure
from atp.evaluate.measure import (
    compare_speed,
    count_parameters,
    file_mib,
    macs_per_token,
    measure_speed,
    peak_memory,
    peak_memory_mib,
    weights_mib,
)
from atp.model.widths import LayerWidths, build_model, pruned_config

MIB = 1024**2


# ---- parameters and multiply-accumulates


@pytest.mark.parametrize(("family", "attention", "tied", "biased"), SHAPES)
def test_parameters_are_those_of_the_state_dict_with_ties_once(
    family: str, attention: str, tied: bool, biased: bool
) -> None:
    model = tiny_model(family, attention, tied=tied, biased=biased)
    by_storage = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    assert count_parameters(model) == sum(by_storage.values())
    assert weights_mib(model) == pytest.approx(sum(by_storage.values()) * 4 / MIB, rel=0.01)  # and the rotary buffers
    assert weights_mib(model.half()) == pytest.approx(sum(by_storage.values()) * 2 / MIB, rel=0.01)


@pytest.mark.parametrize(("attention", "kv_heads"), [("mha", 6), ("gqa", 3), ("mqa", 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_macs_of_a_dense_model(attention: str, kv_heads: int, tied: bool) -> None:
    model = tiny_model("llama", attention, tied=tied)
    for context in (1, 50):
        scores = 2 * 6 * 8 * context
        layer = 48 * 8 * (6 + 2 * kv_heads) + 6 * 8 * 48 + 3 * 48 * 20 + scores
        assert macs_per_token(model, context) == 2 * layer + 48 * 64
    assert macs_per_token(model.config, 50) == macs_per_token(model, 50)


def test_macs_follow_the_widths_of_each_layer() -> None:
    base = tiny_model("llama", "gqa", layers=3).config
    widths = [LayerWidths(4, 2, 8, 20), LayerWidths(0, 0, 8, 12), LayerWidths(2, 1, 8, 0)]
    model = build_model(pruned_config(base, widths), dtype=torch.float32, initialize=True)
    expected = 48 * 64
    for width in widths:
        heads, kv_heads = width.num_attention_heads, width.num_key_value_heads
        expected += 48 * 8 * (2 * heads + 2 * kv_heads) + 3 * 48 * width.intermediate_size + 2 * heads * 8 * 32
    assert macs_per_token(model, 32) == expected


def test_a_sliding_window_bounds_the_keys_and_adapters_count() -> None:
    model = tiny_model("mistral")
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 10
    assert macs_per_token(model, 40) == macs_per_token(model, 10) == macs_per_token(model, 9) + 2 * 2 * 6 * 8
    plain = tiny_model()
    before = macs_per_token(plain, 20)
    adapted = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"]))
    assert macs_per_token(adapted, 20) == before + 2 * 4 * (48 + 48)


# ---- speed


class Clock:
    """Time that passes only when a model runs: as much as its depth and the tokens it reads."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[int] = []

    def attach(self, model: PreTrainedModel, slow_first: bool = False) -> None:
        layers = model.config.num_hidden_layers

        def run(module: object, args: tuple, kwargs: dict) -> None:
            assert not model.training and torch.is_inference_mode_enabled()
            fresh = kwargs.get("past_key_values") is None
            warm = not slow_first or layers in self.order
            self.now += layers * kwargs["input_ids"].shape[1] * (0.001 if fresh else 0.003) * (1 if warm else 50)
            if fresh:
                self.order.append(layers)

        model.register_forward_pre_hook(run, with_kwargs=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    return clock


def test_speed_is_the_median_without_the_warm_up(clock: Clock) -> None:
    model = tiny_model(layers=2).train()
    clock.attach(model, slow_first=True)
    found = measure_speed(model, prompt_tokens=20, new_tokens=5, batch_size=3, repeats=1)
    assert found["prefill_latency_ms"] == pytest.approx(2 * 20 * 1.0)
    assert found["prefill_tokens_per_s"] == pytest.approx(3 * 20 / 0.04)
    assert found["decode_latency_ms"] == pytest.approx(2 * 3.0)
    assert clock.order == [2] * 2 and model.training


def test_two_models_are_timed_in_alternation_and_compared(clock: Clock) -> None:
    dense, pruned = tiny_model(layers=3), tiny_model(layers=2)
    clock.attach(dense)
    clock.attach(pruned)
    found = compare_speed(dense, pruned, prompt_tokens=10, new_tokens=4, repeats=3)
    assert clock.order == [3, 2, 2, 3, 3, 2, 2, 3]
    assert found["prefill_ratio"] == pytest.approx(1.5) and found["decode_ratio"] == pytest.approx(1.5)
    assert found["dense"]["prefill_latency_ms"] == pytest.approx(30.0)
    assert found["pruned"]["decode_latency_ms"] == pytest.approx(6.0)
    assert found["repeats"] == 3 and found["threads"] == torch.get_num_threads() and found["device"] == "cpu"


def test_real_time_is_positive_and_the_random_state_untouched() -> None:
    state = torch.get_rng_state()
    found = measure_speed(tiny_model(seed=0), prompt_tokens=8, new_tokens=2, repeats=1)
    assert set(found) == {"prefill_latency_ms", "prefill_tokens_per_s", "decode_latency_ms"}
    assert all(value > 0 for value in found.values())
    torch.set_rng_state(state)
    model = tiny_model()
    state = torch.get_rng_state()
    measure_speed(model, prompt_tokens=8, new_tokens=2, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_speed_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="exceed the model's context of 64 tokens"):
        compare_speed(tiny_model(), tiny_model(), prompt_tokens=60, new_tokens=5)
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        measure_speed(tiny_model(), repeats=0)


# ---- memory and files


def test_peak_memory_is_of_the_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    big = torch.ones(160 * MIB // 4)
    with_big = peak_memory_mib()
    assert with_big > 160
    del big
    with peak_memory() as small:
        pass
    with peak_memory("cpu") as peak:
        block = torch.ones(96 * MIB // 4)
        del block
    assert peak.mib >= 96
    if peak.kind == "process_rss":
        assert small.mib < with_big - 100 and peak.mib > small.mib + 80
    monkeypatch.setattr(measure, "_PROCESS_STATUS", tmp_path / "absent")
    monkeypatch.setattr(measure, "_PROCESS_RESET", tmp_path / "absent" / "file")
    with peak_memory() as since_start:
        pass
    assert since_start.kind == "process_rss_since_start" and since_start.mib >= 96


def test_peak_memory_is_noted_when_the_block_fails() -> None:
    with pytest.raises(RuntimeError, match="stop"), peak_memory() as peak:
        raise RuntimeError("stop")
    assert peak.mib > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_counts_tensors() -> None:
    with peak_memory("cuda") as peak:
        block = torch.ones(64 * MIB // 4, device="cuda")
        del block
    assert peak.kind == "cuda_allocated" and 64 <= peak.mib < 80


def test_file_sizes(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    expected = sum(tensor.numel() for tensor in model.state_dict().values()) * 4 / MIB
    assert file_mib(tmp_path) == file_mib(tmp_path / "model.safetensors") == pytest.approx(expected, rel=0.05)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert file_mib(str(tmp_path / "shards")) == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="neither a file nor a directory with"):
        file_mib(tmp_path / "shards" / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="name an exported model"):
        file_mib(tmp_path / "empty")


def test_a_config_needs_no_memory_to_count() -> None:
    config = LlamaConfig(num_key_value_heads=32)  # 7B
    assert macs_per_token(config, 1) == 6_476_005_376 + 2 * 32 * 4096 + 4096 * 32000
