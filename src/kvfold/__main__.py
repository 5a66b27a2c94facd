"""`python -m kvfold`: the command line, where its script is not on the path."""

from kvfold.cli.main import main

main()
