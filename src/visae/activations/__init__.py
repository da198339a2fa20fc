"""Activation stores: the format, recording, reading, and ordered and shuffled loading."""
