"""vLLM's Transformers backend for layers of different widths, some of them without attention.

vLLM imports this when it serves one of our architectures (:mod:`atp.export.vllm.plugin`), in the process that builds
the model. The backend builds ``AutoModel`` from the config, sizes each attention layer by its own entry of
``per_layer_config`` and replaces linears and attention by its own. What it has no words for is a layer that has no
attention, which is all that is added here. Written against vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.fusers.attention import AttentionFuser

from atp.model import modeling_atp
from atp.model.families import family_of

# A config comes to the engine's process pickled, which imports its class but does not make AutoModel know it.
modeling_atp.register()


class AtpForCausalLM(TransformersForCausalLM):
    """An export with widths per layer, of any family."""

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Makes vLLM's attention for the layers that have heads.

        vLLM makes one for each layer and refuses layers where it found no call of attention. Those without heads are
        named to it, and what it made for them is taken off again, so that no cache is kept for them.
        """
        without = self._layers_without_heads()
        for index, name in without.items():
            self.attention_fusers[index] = (name, AttentionFuser(source_cls=modeling_atp.NoHeads.__name__))
        super()._create_attention_instances(prefix)
        for index, name in without.items():
            module: Any = self.get_submodule(name)
            del self.compilation_config.static_forward_context[module.attn.layer_name]
            del module.attn
            del self.attention_fusers[index]

    def _layers_without_heads(self) -> dict[int, str]:
        """Attention modules that compute none, by layer; known by name, as the class may be of the exported file."""
        family = family_of(self.text_config)
        absent = modeling_atp.NoHeads.__name__
        return {
            int(index): f"{family.layers}.{index}.{family.attention}"
            for index, layer in self.get_submodule(family.layers).named_children()
            if type(getattr(layer, family.attention, None)).__name__ == absent  # other ranks' layers have no attention
        }
