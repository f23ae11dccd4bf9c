"""`python -m normtune`: the command line."""

from normtune.cli import main

main()
