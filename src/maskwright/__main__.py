"""`python -m maskwright`, as torchrun wants it."""

from maskwright.cli import main

main()
