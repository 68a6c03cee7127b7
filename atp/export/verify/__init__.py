"""Exports opened in fresh processes and compared with the model they came from."""
