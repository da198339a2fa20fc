"""How good an SAE is: every metric beside its nulls, with intervals over images."""
