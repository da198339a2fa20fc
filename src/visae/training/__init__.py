"""Training: one loop for one or many SAEs over one stream of activations."""
