"""Section 3: CHANNEL."""
