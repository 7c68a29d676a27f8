"""Section 14 FETCH: default configs from the web, signed."""
