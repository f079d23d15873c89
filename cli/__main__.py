"""`python -m unipic2.cli`."""

import sys

from . import main

sys.exit(main())
