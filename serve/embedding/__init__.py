"""Content into vectors."""
