"""Hugging Face directories: writing, strict loading, the model card."""
