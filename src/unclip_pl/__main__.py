"""Run ``python -m unclip_pl``, which is ``unclip``."""

import sys

from unclip_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
