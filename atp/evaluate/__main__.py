"""``python -m atp.evaluate``: the same as ``atp evaluate``."""

import sys

from atp.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
