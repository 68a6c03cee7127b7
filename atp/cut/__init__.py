"""From scores to a smaller model: which units stay, and the weights without the others.

Takes scores and a budget and gives 0/1 masks; takes masks and gives a smaller model (removal) or makes the model that
trains smaller in place, with its optimiser (compaction). It does not know how scores were made or what is trained.
"""
