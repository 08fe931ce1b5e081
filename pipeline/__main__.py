"""`python -m pipeline` is the command `prefline`."""

from pipeline.cli import main

main()
