"""Training: plain tuning, joint masks and adapters, what is watched, logged and kept meanwhile."""
