"""The pruning space: units, what each owns in a model, and what it costs."""
