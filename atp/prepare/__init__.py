"""What happens before the first training step: importance, the start, baselines, and repair of the cut.

Takes the masked model and calibration batches; gives starting scores of units, and weights that make up for what a cut
removes. Two-stage baselines are scores without learning, so they are here. It knows no trainer and no run directory.
"""
