"""``python -m sslfast`` is the command ``sslfast``."""

import sys

from sslfast.cli.main import main

sys.exit(main())
