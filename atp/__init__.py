"""ATP: joint structured pruning and LoRA tuning of LLaMA-family models."""
