"""`python -m xray` is `xray`; `torchrun -m xray train ...` starts it on many processes."""

import sys

from xray.cli import main

sys.exit(main())
