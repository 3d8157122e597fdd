"""The subcommands of the command line, one file each: `add` describes its arguments, `run` returns the exit code."""
