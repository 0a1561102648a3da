"""One file per subcommand of `turboquant-hf`: `add_arguments(parser)`, and `run(args)` -> exit status."""
