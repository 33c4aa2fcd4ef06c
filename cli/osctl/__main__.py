"""`python -m osctl`."""

import sys

from osctl.main import main

sys.exit(main())
