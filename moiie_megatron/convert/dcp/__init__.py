"""Files of Megatron ``torch_dist`` checkpoints, tensor by tensor.

The only folder that knows how ``torch.distributed.checkpoint`` lays out its files, private names
included (``_StorageInfo``); ``tests/unit/convert/dcp`` compare with what the installed torch
writes and reads.

Trust: ``.metadata`` is a pickle, which torch and Megatron load as it is and so does ``reader.py``:
open no checkpoint from somebody who might mean harm.
"""
