"""The best file of a given size: a search over methods, floats, ranks and training settings (docs/search.md)."""
