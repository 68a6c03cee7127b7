"""Evaluation of any causal LM, pruned by this project or not: quality on records, and size, speed and memory.

Takes a model, a tokenizer and records; gives figures, each with the number of items and what every item gave, from
which intervals and paired comparisons follow. It does not know masks or how a model was made.
"""
