"""``python -m atp.compare``: the same as ``atp compare``."""

import sys

from atp.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
