"""Edits, controls and experiments: from a hypothesis about features to a verdict."""
