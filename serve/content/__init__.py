"""What came in -> what a model eats."""
