"""`python -m benchmarks.compile_gate`."""

import sys

from .gate import main

sys.exit(main())
