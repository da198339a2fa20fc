"""Where images, labels and groups come from; safe decoding, content ids and splits."""
