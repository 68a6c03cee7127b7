"""Evaluation of any causal LM, pruned by this project or not: quality on records, and size, speed and memory."""
