"""The Python engines that users open exports with, each behind the same three methods; imports nothing of atp.

:mod:`atp.export.verify.probe` makes one of them in a fresh process, or that of :mod:`atp.export.llama_cpp.engine`. An
engine takes the task, and has ``logits`` of one window, ``generate`` (greedy, with its own cache), ``remark`` (what to
know of the result) and, where it brings a tokenizer of its own, ``tokenize``.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FOUR_BIT_BLOCK = 32


class TransformersEngine:
    """A Hugging Face directory, an adapter on it, or either quantised while loading."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.torch = torch
        path = Path(task["path"])
        custom = "auto_map" in json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = task.get("quantised")
        odd = odd_modules(path) if kind in ("bnb-4bit", "torchao-4bit") else []
        self.remark = f"{len(odd)} matrices kept whole: widths not multiples of {FOUR_BIT_BLOCK}" if odd else ""
        options = {"trust_remote_code": custom, "dtype": torch.float32, **quantised(kind, ["lm_head", *odd])}
        self.model = AutoModelForCausalLM.from_pretrained(str(path), **options).eval()
        if torch.cuda.is_available() and not task.get("quantised"):
            self.model = self.model.to("cuda")
        if task["format"] == "adapter":
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, str(path / "adapter")).eval()

    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        """Logits [T, V] of one window."""
        with self.torch.no_grad():
            ids = self.torch.tensor(ids_T[None], device=self.model.device)
            return self.model(input_ids=ids).logits[0].float().cpu().numpy()

    def generate(self, prompt_T: np.ndarray, new_tokens: int) -> list[int]:
        """Greedy continuation; the plain loop, as settings of the generation config would bias it."""
        ids = self.torch.tensor(prompt_T[None], device=self.model.device)
        made: list[int] = []
        past = None
        with self.torch.no_grad():
            for _ in range(new_tokens):
                output = self.model(input_ids=ids, past_key_values=past, use_cache=True)
                past = output.past_key_values
                made.append(int(output.logits[0, -1].argmax()))
                ids = self.torch.tensor([made[-1:]], device=self.model.device)
        return made


def quantised(kind: str | None, kept: list[str]) -> dict[str, Any]:
    """Arguments of from_pretrained that quantise while loading, but for the modules `kept`."""
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "bnb-4bit":
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept)
        return {"quantization_config": four_bits}
    if kind == "bnb-int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if kind == "torchao-int8":
        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    # Not Int4WeightOnlyConfig, whose kernels need a GPU: this one is computed anywhere.
    groups = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(FOUR_BIT_BLOCK))  # type: ignore
    return {"quantization_config": TorchAoConfig(groups, modules_to_not_convert=kept)}


def odd_modules(path: Path) -> list[str]:
    """Linears of a directory that no 4-bit kernel takes, as their widths are not multiples of its block."""
    from safetensors import safe_open

    odd = []
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118 -- not a dict
                shape = stored.get_slice(name).get_shape()
                if ".layers." in name and len(shape) == 2 and any(size % FOUR_BIT_BLOCK for size in shape):
                    odd.append(name.removesuffix(".weight"))
    return odd


class OnnxEngine:
    """An ONNX graph with a cache, in onnxruntime."""

    remark = ""

    def __init__(self, task: dict[str, Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = task.get("threads") or 1
        self.session = onnxruntime.InferenceSession(task["path"], options, providers=["CPUExecutionProvider"])
        past = [item for item in self.session.get_inputs() if item.name.startswith("past_")]
        self.past_shapes = {item.name: (1, item.shape[1], 0, item.shape[3]) for item in past}

    def _run(self, ids_T: np.ndarray, past: dict[str, np.ndarray], seen: int) -> tuple[np.ndarray, dict[str, Any]]:
        inputs = {"input_ids": ids_T[None].astype(np.int64), **past}
        inputs["attention_mask"] = np.ones((1, seen + len(ids_T)), np.int64)
        outputs = self.session.run(None, inputs)
        kept = dict(zip(self.past_shapes, outputs[1:], strict=True))
        return outputs[0][0], kept

    def _empty(self) -> dict[str, np.ndarray]:
        return {name: np.zeros(shape, np.float32) for name, shape in self.past_shapes.items()}

    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        """Logits [T, V] of one window."""
        return self._run(ids_T, self._empty(), 0)[0]

    def generate(self, prompt_T: np.ndarray, new_tokens: int) -> list[int]:
        """Greedy continuation."""
        made: list[int] = []
        ids_T, past, seen = prompt_T, self._empty(), 0
        for _ in range(new_tokens):
            logits_TV, past = self._run(ids_T, past, seen)
            made.append(int(logits_TV[-1].argmax()))
            if past:
                ids_T, seen = np.asarray(made[-1:]), seen + len(ids_T)
            else:  # a graph without cache computes the whole sequence again
                ids_T = np.append(ids_T, made[-1])
        return made
