"""The command line: one file per subcommand. Nothing outside this folder prints."""
