"""Certified removal: methods whose results carry an (epsilon, delta) guarantee, and what it rests on."""
