"""The nouns that every room shares, and the protocols between rooms. Imports no other room."""
