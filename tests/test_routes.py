"""ROUTES."""
