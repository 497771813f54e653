"""Records to token ids, targets, token types and pixels."""
