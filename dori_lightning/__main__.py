"""``python -m dori_lightning``; workers cannot import this module, so `cli` holds everything."""

import sys

from dori_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
