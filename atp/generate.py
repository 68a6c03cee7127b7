"""``python -m atp.generate``: the same as ``atp generate``."""

import sys

from atp.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
