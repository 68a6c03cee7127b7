"""Reading: the user's files as rows, each with its place."""
