"""The configuration: schema of every option, help texts, short names of classes."""
