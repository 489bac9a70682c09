"""The command `jahubert`: subcommands, console output, feature files and shell completion."""
