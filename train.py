"""Prune and tune a model: ``python train.py experiment=legal_50pct``; ``--help`` explains the options."""

from atp.cli import main

if __name__ == "__main__":
    main()
