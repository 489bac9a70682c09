"""The `jahubert` command: subcommands, console messages, feature files and shell completion."""
