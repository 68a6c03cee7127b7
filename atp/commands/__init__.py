"""The commands a user types: arguments in, exit code out."""
