"""Feature indexes: sparse codes, statistics and examples of every feature of an SAE, on disk."""
