"""Which layouts a run can have on a number of GPUs, and which of them is the fastest."""
