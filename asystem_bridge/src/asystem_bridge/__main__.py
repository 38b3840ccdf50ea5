"""``python -m asystem_bridge`` is ``asystem-bridge``."""

import sys

from asystem_bridge.cli import main

sys.exit(main())
