"""The parts of an SAE that cost time, each tested against the plain dense formula."""
