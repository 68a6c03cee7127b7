"""The pruning space: which units a model has, what each owns, and what removing it saves.

Takes a loaded model and the kinds of units to prune; gives one flat vector of U units, the rows and columns of every
weight that each owns, the places where a mask has the effect of removal, and costs. It knows module names and shapes,
and nothing of scores, LoRA or training.
"""
