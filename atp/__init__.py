"""ATP: joint structured pruning and LoRA tuning of LLaMA-family models.

Importing the package lets transformers' Auto classes load per-layer-width models without ``trust_remote_code``; the
model classes themselves are imported only when one is first needed.
"""

from atp.model.registry import register_on_demand

__version__ = "0.1.0"

register_on_demand()
