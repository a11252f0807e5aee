"""`python -m fedsim`, which is also what torchrun starts."""

from fedsim.cli import main

main()
