"""The files of a tokenizer, and how they are read: the same for training and exports."""
