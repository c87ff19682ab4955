"""`python -m command` is the `reverie` command."""

from command.app import main

main()
