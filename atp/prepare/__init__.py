"""What happens before the first step: importance, the start, baselines, and repair of the cut."""
