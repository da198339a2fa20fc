"""``python -m visae`` is the program ``visae``."""

import sys

from visae.cli.app import main

__all__: list[str] = []

sys.exit(main())
