"""Hugging Face directories: writing them, loading them back strictly, and the model card.

Takes a model, its tokenizer and what the card says; gives a directory that transformers loads. It knows no run.
"""
