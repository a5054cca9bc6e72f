"""`python -m data_tools <tool>`."""

import sys

from data_tools.cli import main

sys.exit(main())
