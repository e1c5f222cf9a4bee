"""``python -m fastnce``."""

import sys

from fastnce.cli import main

sys.exit(main())
