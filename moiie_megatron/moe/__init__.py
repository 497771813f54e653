"""The MoIIE layer: modality routers, their losses, the token dispatcher, grouped experts.

Shape letters
-------------
The suffix of a tensor's name lists its axes: ``probs_TE`` has one row per token and one column
per expert.  The letters are the same in moe/, vlm/, mcore/ and routing_stats/:

    T  tokens of this rank, s * b
    D  hidden size
    F  FFN size of an expert on this expert-tensor-parallel rank
    E  experts in logical order: the ids of layout/experts.py, which checkpoints know
    P  the same experts in physical order: expert-parallel rank 0 first (layout/placement.py)
    L  local experts, those that this expert-parallel rank holds: P / N
    K  experts chosen per token, "top-k"
    G  gates: the routers of a layer (vision and text, or joint)
    W  scores of all gates side by side: the sum of their numbers of experts
    M  modalities, in the order of MODALITIES (layout/token_types.py)
    A  M + 1 kinds of token: the modalities, then all tokens with padding
    N  expert-parallel ranks
    R  rows: what a dispatcher sends, receives, or passes to the experts
    X  copies of rows, one per (row, destination)
    Z  destinations that rows are copied to: N ranks, or L local experts

Lower case letters stand at the border with Megatron-Core and transformers:

    b  rows of a batch          n  attention heads             i  images
    s  sequence (this rank's    g  key/value heads             p  image tokens per image
       part under sequence      d  size of an attention head   y  tokens with a label
       parallelism)             c  segments of a packed row    h  hidden size, as D
"""
