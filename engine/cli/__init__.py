"""The `halimede` command."""
