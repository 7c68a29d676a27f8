"""EMBED."""
