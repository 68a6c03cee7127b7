"""What tensors of a GGUF file are called, by role, and which architectures order the rows of queries otherwise.

The one table of llama.cpp's names, read by the reader here and by the writer in :mod:`atp.export.gguf`. Knows names
alone.
"""

from __future__ import annotations

from atp.model.families import Norm

NEIGHBOURS = ("llama", "deci", "smollm3", "granite")
"""Architectures that rotate neighbouring dimensions; the rows of their queries and keys are permuted."""
FACTORS = ("llama", "deci", "granite")
"""Architectures that read :data:`ROTARY_FACTORS`."""
LINEARS = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
"""Projections, by role."""
EMBEDDINGS, FINAL_NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
ROTARY_FACTORS = "rope_freqs.weight"
"""What the default rotary frequencies are divided by, where anything."""
_HEAD_NORMS = {"query": "attn_q_norm", "key": "attn_k_norm"}
_STREAM_NORMS = {"attention": "attn_norm", "mlp": "ffn_norm"}
_NORMS_AFTER = {"attention": "post_attention_norm", "mlp": "post_ffw_norm"}


def norm_name(norm: Norm) -> str:
    """What a norm of a layer is called."""
    return _HEAD_NORMS.get(norm.over) or (_NORMS_AFTER if norm.after else _STREAM_NORMS)[norm.block]
