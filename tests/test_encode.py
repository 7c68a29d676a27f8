"""ENCODE."""
