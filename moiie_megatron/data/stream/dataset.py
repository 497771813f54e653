"""Several LLaVA sources as one map-style dataset of encoded samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from moiie_megatron.data.encode.encoder import encode
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.encode.templates import Template
from moiie_megatron.data.encode.tokenizers import Tokenizer
from moiie_megatron.data.records.llava import BadRecord, Record, RecordFile
from moiie_megatron.data.stream.example import Example
from moiie_megatron.data.stream.order import Blend
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Source:
    """A record file and the folder of its images.

    Attributes:
        weight: How often an epoch sees every sample.
        name: For messages; empty stands for the name of the record file.
    """

    records: RecordFile
    images: ImageLoader
    weight: float = 1.0
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.records.path.name


class LlavaDataset:
    """The records of all sources in order; ``dataset[i] -> Example``.  Picklable.

    Args:
        sources: Concatenated.
        tokenizer: For every source.
        template: For every source.
        num_image_tokens: Positions per image.
        sequence_length: Largest number of tokens of a sample.

    Raises:
        UserError: No source, or image folders with different image sizes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        template: Template,
        num_image_tokens: int,
        sequence_length: int,
    ) -> None:
        if not sources:
            raise UserError("data.sources is empty: name at least one file of records.")
        sizes = {source.images.image_size for source in sources}
        if len(sizes) > 1:
            raise UserError(f"The sources have image sizes {sorted(sizes)}: use one size.")
        self.sources = tuple(sources)
        self.tokenizer = tokenizer
        self.template = template
        self.num_image_tokens = num_image_tokens
        self.sequence_length = sequence_length
        self.image_size = sizes.pop()
        self._ends = list(accumulate(len(source.records) for source in sources))
        self.blend = Blend.weighted(
            [len(source.records) for source in sources], [source.weight for source in sources]
        )

    def describe_epoch(self) -> str:
        """One line: how many samples of every source an epoch has."""
        return self.blend.describe_epoch([source.label for source in self.sources])

    def describe_order(self, dp_size: int) -> str:
        """What the order depends on beside the seed: the same on any number of ranks."""
        return self.blend.describe()

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, i: int) -> Record:
        """The record behind sample ``i``.

        Raises:
            BadRecord: It is malformed.
        """
        source, index = self._locate(i)
        return source.records[index]

    def __getitem__(self, i: int) -> Example:
        """Sample ``i``, encoded, with its images.

        Raises:
            BadRecord: The record or one of its images cannot be used; names file and record.
            IndexError: There is no sample ``i``.
        """
        source, index = self._locate(i)
        record = source.records[index]
        try:
            encoded = encode(
                record, self.tokenizer, self.template, self.num_image_tokens, self.sequence_length
            )
            pixels = [source.images.load(path) for path in record.images]
        except BadRecord as error:
            raise BadRecord(error.reason, str(source.records.path), index) from error
        side = self.image_size
        images = torch.stack(pixels) if pixels else torch.empty(0, 3, side, side, dtype=torch.uint8)
        return Example(encoded, images, record.id)

    def _locate(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"the dataset has {len(self)} samples, no sample {i}")
        number = bisect_right(self._ends, i)
        return self.sources[number], i - (self._ends[number - 1] if number else 0)
