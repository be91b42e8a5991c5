"""`python -m xray.train` is `xray train`; `torchrun --nproc-per-node 8 -m xray.train ...` starts many processes."""

from xray.cli import program

program("train")
