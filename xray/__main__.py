"""`python -m xray` is `xray`; `torchrun -m xray train ...` starts it on many processes."""

from xray.cli import program

program()
