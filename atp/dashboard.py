"""``python -m atp.dashboard``: the same as ``atp dashboard``."""

import sys

from atp.commands.dashboard import main

if __name__ == "__main__":
    sys.exit(main())
