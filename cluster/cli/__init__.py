"""The `milliways` command.

    from milliways.cluster.cli.main import main

    exit_code = main(["generate", "--max-tokens", "8", "Welcome to"])

This package owns the command line: options, output and exit codes. The work is done by the packages
below it; a command's module in `commands/` is imported only if that command runs.

Invariants: results go to standard output, messages to standard error. Every error that a user can
cause ends as one line with the command's name, and as an exit code that `main` lists.
"""
