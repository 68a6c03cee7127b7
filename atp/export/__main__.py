"""``python -m atp.export``: the same as ``atp export``."""

import sys

from atp.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
