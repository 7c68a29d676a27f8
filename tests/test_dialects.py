"""DIALECTS."""
