"""``python -m atp.serve``: the same as ``atp serve``."""

import sys

from atp.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
