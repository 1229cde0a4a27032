"""Who may, how much, who is next: pure decisions."""
