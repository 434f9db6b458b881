"""Quality of samples: Fréchet distances in feature spaces that need no download."""
