"""`python -m sslus.tools` is the same as `sslus`; torchrun needs a module."""

import sys

from sslus.tools.cli import main

sys.exit(main())
