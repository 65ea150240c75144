"""``python -m sslfast`` is the command ``sslfast``."""

import sys

from sslfast.cli import main

sys.exit(main())
