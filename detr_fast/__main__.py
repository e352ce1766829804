"""``python -m detr_fast …`` is ``detr-fast …``."""

import sys

from detr_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
