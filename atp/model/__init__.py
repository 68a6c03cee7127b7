"""Models: what sets families apart, widths per layer, and the modeling file of models whose layers differ."""
