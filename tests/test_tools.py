"""TOOLS."""
