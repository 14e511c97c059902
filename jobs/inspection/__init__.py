"""A look at INPUT before it is scored: what the student would read, and what of it scores."""
