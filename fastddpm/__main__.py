"""`python -m fastddpm` is the same program as `fastddpm`."""

import sys

from .cli import main

sys.exit(main())
