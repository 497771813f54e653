"""What is in a data set before a run."""
