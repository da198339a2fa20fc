"""Figures and static HTML that opens from disk."""
