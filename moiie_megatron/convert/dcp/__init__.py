"""Files of Megatron ``torch_dist`` checkpoints, tensor by tensor.

The only folder that knows how ``torch.distributed.checkpoint`` lays out its files, private names
included (``_StorageInfo``); ``tests/unit/convert/dcp`` compare with what the installed torch
writes and reads.

Trust: nothing in a checkpoint is run (``utils/dcp_metadata.py``, ``tensor_archive.py``).
"""
