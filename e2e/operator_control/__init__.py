"""The operator against a real API server: what it writes, when, and that nothing stops it."""
