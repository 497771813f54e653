"""Files of Megatron ``torch_dist`` checkpoints, tensor by tensor."""
