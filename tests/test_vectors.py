"""VECTORS."""
