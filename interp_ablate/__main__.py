"""`python -m interp_ablate`: the command line.

Knows: where it starts. Does not know: anything else.
"""

import sys

from interp_ablate.cli.main import main

sys.exit(main())
