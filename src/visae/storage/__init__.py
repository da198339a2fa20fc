"""Files that are whole or absent: atomic writes, hashes, versioned records, tensors, locks."""
