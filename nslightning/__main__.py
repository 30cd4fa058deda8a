"""``python -m nslightning``."""

import sys

from nslightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
