"""Records to token ids, labels and token types; image files to pixels."""
