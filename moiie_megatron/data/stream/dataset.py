"""Several LLaVA sources as one map-style dataset of encoded samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from moiie_megatron.data.encode.encoding import Encoding
from moiie_megatron.data.encode.images import ImageLoader
from moiie_megatron.data.records.llava import RecordFile
from moiie_megatron.data.records.record import BadRecord
from moiie_megatron.data.stream.example import Example, notices
from moiie_megatron.data.stream.order import Blend
from moiie_megatron.utils.errors import UserError


@dataclass(frozen=True)
class Source:
    """A record file and the directory of its images.

    Attributes:
        weight: How often an epoch visits every sample, on average.
        name: For messages; if empty, the name of the record file is used.
    """

    records: RecordFile
    images: ImageLoader
    weight: float = 1.0
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or self.records.path.name


class LlavaDataset:
    """Map-style dataset of the records of all sources in order: index -> ``Example``.  Picklable.

    Args:
        sources: Concatenated.
        encoding: Applies to every source.

    Raises:
        UserError: No source, or sources with different image sizes.
    """

    def __init__(self, sources: Sequence[Source], encoding: Encoding) -> None:
        if not sources:
            raise UserError("data.sources is empty: name at least one file of records.")
        sizes = {source.images.image_size for source in sources}
        if len(sizes) > 1:
            raise UserError(f"The sources have image sizes {sorted(sizes)}: use one size.")
        self.sources = tuple(sources)
        self.encoding = encoding
        self.image_size = sizes.pop()
        self._ends = list(accumulate(len(source.records) for source in sources))
        self.blend = Blend.weighted(
            [len(source.records) for source in sources], [source.weight for source in sources]
        )

    def describe_epoch(self) -> str:
        """One line for the log: the number of samples of every source in an epoch."""
        return self.blend.describe_epoch([source.label for source in self.sources])

    @property
    def num_image_tokens(self) -> int:
        return self.encoding.num_image_tokens

    @property
    def pad_id(self) -> int:
        return self.encoding.tokenizer.pad_id

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Example:
        """Sample ``i``: its record encoded and its images decoded.

        Raises:
            BadRecord: The record or one of its images cannot be used; names file and record.
            IndexError: There is no sample ``i``.
        """
        source, index = self._locate(i)
        record = source.records[index]
        try:
            encoded = self.encoding.encode(record)
            images = source.images.load_all(record.images)
        except BadRecord as error:
            raise BadRecord(error.reason, str(source.records.path), index) from error
        return Example(encoded, images, record.id, notices=notices(record, encoded, source.label))

    def _locate(self, i: int) -> tuple[Source, int]:
        """The source of sample ``i`` and its record number there."""
        if not 0 <= i < len(self):
            raise IndexError(f"the dataset has {len(self)} samples, no sample {i}")
        number = bisect_right(self._ends, i)
        return self.sources[number], i - (self._ends[number - 1] if number else 0)
