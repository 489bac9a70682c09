"""The `jahubert` command: subcommands, console output, feature files and shell completion."""
