"""`python -m lowbit.cli`, the same as the command `lowbit`."""

import sys

from lowbit.cli import main

sys.exit(main())
