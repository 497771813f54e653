"""From LLaVA records and image directories to micro-batches: one order of samples for every layout.

``records`` reads record files, ``encode`` turns records into token ids and images into pixels,
``stream`` decides which rank reads which sample and builds the micro-batches, ``audit`` measures a
data set before a run, ``digits`` is a small data set for tests and the demo.

Shapes are written with the letters of ``moiie_megatron/moe/__init__.py`` (b rows, s positions) and

    n  images, of one sample or of a whole micro-batch
    S  pixels per side of an image
    t  tokens of one sample
    l  positions that have a label
    q  segments of a packed row: its samples, then its padding
    N  records of a file, or samples of an epoch
"""
