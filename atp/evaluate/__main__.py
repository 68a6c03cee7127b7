"""``python -m atp.evaluate``: the same as ``atp evaluate``."""

from atp.commands.evaluate import main

if __name__ == "__main__":
    main()
