"""One rank of any world on fake tensors: the project's own code at full size, without memory."""
