"""Model families: names, shapes and transforms of their weights."""
