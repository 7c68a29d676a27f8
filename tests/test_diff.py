"""Section 3: DIFF."""
