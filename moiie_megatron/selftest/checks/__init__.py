"""The checks themselves, and the models, tokens and comparisons that they share."""
