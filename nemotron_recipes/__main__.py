"""`python -m nemotron_recipes`: the same as `nemotron`."""

from nemotron_recipes.cli.main import main

main()
