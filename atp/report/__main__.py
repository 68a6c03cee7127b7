"""``python -m atp.report``: the same as ``atp report``."""

import sys

from atp.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
