"""From LLaVA records and image directories to micro-batches: one order of samples for every layout.

``records`` reads record files, ``encode`` turns records into token ids and images into pixels,
``stream`` decides which rank reads which sample and builds the micro-batches, ``packing`` puts
several samples into one, ``audit`` measures a data set before a run, ``digits`` is a small data set
for tests and the demo.

Shapes are written with the letters of ``moiie_megatron/moe/__init__.py``, among them

    b  rows of a micro-batch
    s  positions of a row
    i  images of a sample or of a whole micro-batch
    c  segments of a packed row: its samples, then its padding
    y  positions with a label

and with three of this package's own:

    S  pixels per side of an image
    t  tokens of one sample
    r  records of a file, or samples of an epoch
"""
