"""Runs: the order of stages, the run directory, sweeps; with commands, the only reader of the configuration."""
