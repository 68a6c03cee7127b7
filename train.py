"""Prune and tune a model: ``python train.py experiment=legal_50pct``; ``--help`` explains the options."""

from atp.commands.train import main

if __name__ == "__main__":
    main()
