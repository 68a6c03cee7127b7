"""Writing a pruned model as one ONNX graph, with its KV cache as inputs and outputs.

One graph serves prompt and decoding: it takes the tokens that are new, the attention mask of all, and the keys and
values so far (of zero length at first), and gives logits and the keys and values to pass on. Positions follow from the
mask, so left padding works. Layers without attention have no cache entry. Weights are float32.

Inputs: ``input_ids`` [B, T] and ``attention_mask`` [B, P + T], int64; with a cache, for every layer i that has
attention, ``past_key_<i>`` and ``past_value_<i>`` [B, K, P, H]. Outputs: ``logits`` [B, T, V], then ``present_key_<i>``
and ``present_value_<i>`` [B, K, P + T, H].

Shape suffixes: B batch, T new tokens, P tokens seen, K KV heads, H head dim, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from atp.errors import UserError
from atp.export.extras import require
from atp.export.hf.loading import load_exported
from atp.export.hf.writing import appearing_whole, check_target
from atp.model.families import family_of
from atp.model.widths import LayerWidths, layer_widths

log = logging.getLogger(__name__)

GRAPH_FILE = "model.onnx"
OPSET = 18
_HIDDEN = -1e9


class CachedGraph(nn.Module):
    """The model as a function of tensors only.

    Args:
        model: The causal language model, eager attention.
        cache: Whether past keys and values go in and out.
    """

    def __init__(self, model: PreTrainedModel, *, cache: bool) -> None:
        super().__init__()
        self.model = model
        self.attending = [i for i, layer in enumerate(layer_widths(model.config)) if layer.has_attention]
        self.cache = cache
        kinds = getattr(model.config, "layer_types", None) or ()
        self.window = family_of(model.config).window(model.config)
        self.kinds = set(kinds)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, T, V] and, with a cache, the keys and values of all tokens by layer."""
        tokens = input_ids.shape[1]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        cache = DynamicCache() if self.cache else None
        if cache is not None:
            for slot, index in enumerate(self.attending):
                self._fill(cache, index, past[2 * slot], past[2 * slot + 1])
        output = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(attention_mask, tokens),
            position_ids=positions,
            past_key_values=cache,
            use_cache=self.cache,
        )
        logits = output.logits
        if not self.attending:  # nothing reads the mask then, and the graph would lose that input
            logits = logits + 0.0 * attention_mask[:, -tokens:, None]
        if cache is None:
            return (logits,)
        layers: Any = cache.layers
        present = [part for i in self.attending for part in (layers[i].keys, layers[i].values)]
        return (logits, *present)

    def _fill(self, cache: DynamicCache, index: int, keys: Tensor, values: Tensor) -> None:
        """Puts past keys and values in, with an empty entry for every layer without attention on the way."""
        while len(cache.layers) < index:
            empty = keys.new_zeros(keys.shape[0], 1, 0, 1)
            cache.update(empty, empty, len(cache.layers))
        cache.update(keys, values, index)

    def _masks(self, attention_mask: Tensor, tokens: int) -> Any:
        """Additive masks [B, 1, T, P + T]: nothing later, no padding, and the window where the model has one."""
        seen = torch.arange(attention_mask.shape[1])
        now = seen[-tokens:]
        allowed = (seen[None, :] <= now[:, None])[None, None] & (attention_mask[:, None, None, :] > 0)
        full = torch.where(allowed, 0.0, _HIDDEN)
        if self.window is None:
            return full
        near = (now[:, None] - seen[None, :] < self.window)[None, None]
        sliding = torch.where(allowed & near, 0.0, _HIDDEN)
        return {"full_attention": full, "sliding_attention": sliding} if self.kinds else sliding


def check_graph(config: PreTrainedConfig) -> None:
    """Refuses a config whose rotary frequencies tracing cannot follow, and warns where a graph holds one set of them.

    Raises:
        ValueError: The frequencies are chosen anew by the length (longrope).
    """
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # sliding layers have none that depends on the length
    if rope.get("rope_type") == "longrope":
        raise UserError(
            "ONNX: rope_parameters of the model's config are of type 'longrope', which chooses among two sets of "
            "frequencies by the length, and a graph has one; leave ONNX out (export.onnx=false)"
        )
    if rope.get("rope_type") == "dynamic":
        within = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        log.warning("ONNX: rotary scaling is dynamic, so the graph is the model's equal up to %d tokens only", within)


def export_onnx(
    model_dir: str | Path, output_dir: str | Path | None = None, *, cache: bool = True, overwrite: bool = False
) -> Path:
    """Writes the graph.

    Args:
        model_dir: A directory as :func:`atp.export.hf.writing.export_hf` writes it.
        output_dir: Where it goes; by default ``onnx`` below the model.
        cache: Pass keys and values in and out; without it every step computes the whole sequence.
        overwrite: Replace a graph that is there.

    Returns:
        The graph file; weights beyond 2 GiB lie beside it.

    Raises:
        ValueError: The model is damaged or of a kind that no graph holds, the target is in use, or a package is absent.
        OSError: If the disk is full.
    """
    for package in ("onnx", "onnxruntime"):
        require(package, extra="onnx")
    target = Path(output_dir) if output_dir is not None else Path(model_dir) / "onnx"
    check_target(target.resolve(), overwrite, marker=GRAPH_FILE)
    model: Any = load_exported(model_dir, dtype=torch.float32)
    check_graph(model.config)
    model.set_attn_implementation("eager")
    graph = CachedGraph(model, cache=cache).eval()
    widths = layer_widths(model.config)
    with appearing_whole(target.resolve()) as stage:
        _export(graph, widths, stage / GRAPH_FILE)
        if model.config.tie_word_embeddings:
            _store_once(stage / GRAPH_FILE, tuple(model.get_input_embeddings().weight.shape))
    return target / GRAPH_FILE


def _export(graph: CachedGraph, widths: list[LayerWidths], path: Path) -> None:
    """Traces the graph on a small example with every size free that callers choose."""
    batch, seen, tokens = 2, 3, 4
    names = ["input_ids", "attention_mask"]
    mask = torch.ones(batch, seen + tokens if graph.cache else tokens, dtype=torch.int64)
    mask[0, 0] = 0
    inputs: list[Tensor] = [torch.zeros(batch, tokens, dtype=torch.int64), mask]
    outputs = ["logits"]
    axes = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "seen_and_new"}}
    axes["logits"] = {0: "batch", 1: "tokens"}
    for index in graph.attending if graph.cache else ():
        layer = widths[index]
        key_dim = 2 * len(layer.rotary_pairs) if layer.rotary_pairs is not None else layer.head_dim
        for part, size in (("key", key_dim), ("value", layer.value_dim or layer.head_dim)):
            shape = (batch, layer.num_key_value_heads, seen, size)
            names.append(f"past_{part}_{index}")
            outputs.append(f"present_{part}_{index}")
            inputs.append(torch.randn(shape))
            axes[names[-1]] = {0: "batch", 2: "seen"}
            axes[outputs[-1]] = {0: "batch", 2: "seen_and_new"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing says which sizes it keeps; the ones that vary are free by their axes
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            graph,
            tuple(inputs),
            str(path),
            input_names=names,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )


def _store_once(path: Path, shape: tuple[int, ...]) -> None:
    """Lets a tied output head be the transposed embeddings again, of which tracing has made a second tensor.

    Engines transpose once, when they load. Graphs with weights in files of their own (beyond 2 GiB) are left alone.
    """
    import onnx
    from onnx import numpy_helper

    if len(list(path.parent.iterdir())) > 1:
        return
    model = onnx.load(str(path))
    tables = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    gathered = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for embeddings in (tables[name] for name in gathered if name in tables and tuple(tables[name].dims) == shape):
        expected = numpy_helper.to_array(embeddings).T
        for head in tables.values():
            same_shape = tuple(head.dims) == expected.shape and head is not embeddings
            if same_shape and np.array_equal(numpy_helper.to_array(head), expected):
                transposed = onnx.helper.make_node("Transpose", [embeddings.name], [head.name], perm=[1, 0])
                model.graph.node.insert(0, transposed)
                model.graph.initializer.remove(head)
    onnx.save(model, str(path))
