"""`python -m sslus.tools` is `sslus`: what torchrun needs."""

import sys

from sslus.tools.cli import main

sys.exit(main())
