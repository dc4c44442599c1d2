"""`python -m msr_dist`: the same as the command `msr-dist`."""

from msr_dist.cli import main

main()
