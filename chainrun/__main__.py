"""``python -m chainrun``: the same as the command."""

import sys

from chainrun.cli import main

sys.exit(main())
