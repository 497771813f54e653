"""The typical and the worst step of a data-parallel rank, from a data report or without one."""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.planning.samples.data_report import DataReport
from moiie_megatron.planning.samples.drawn_steps import BatchRules, DrawnSteps, draw_steps
from moiie_megatron.planning.samples.sample_pool import SamplePool
from moiie_megatron.planning.workload import MicroBatchShape, SampleShape, Workload
from moiie_megatron.utils.errors import UserError

# Of the text tokens, where no report says more.
_LABEL_FRACTION: Final = 0.5


def workload_of(
    config: RunConfig,
    *,
    dp_size: int,
    report: DataReport | None = None,
    images_per_sample: int | None = None,
) -> tuple[Workload, Workload]:
    """What one data-parallel rank gets to process in a step.

    The worst step is the typical one with another first micro-batch, the largest that the data
    allows; its ``origin`` says how probable that is where the report tells.  Without a report all
    samples have full length, and the worst micro-batch has the most images or labels instead.

    Args:
        config: Of the run, checked for its number of ranks.
        dp_size: Number of data-parallel ranks.
        report: Lengths and images of the samples; None assumes samples of full length.
        images_per_sample: Images of every sample without a report; None is 1.

    Returns:
        The typical and the worst step.

    Raises:
        UserError: The report is about samples of other sizes, the images do not fit a sample, or
            both a report and a number of images are given.
    """
    rules = BatchRules.of(config, dp_size)
    if report is None:
        return _assumed(config, rules, 1 if images_per_sample is None else images_per_sample)
    if images_per_sample is not None:
        raise UserError(
            f"Both {report.name} and {images_per_sample} images per sample are given: give the "
            "report alone."
        )
    report.check(config)
    drawn = draw_steps(rules, report)
    typical = _most_typical(drawn, SamplePool(report, rules.seed), rules)
    worst, how = _worst(drawn, report, rules)
    origin = f"samples of {report.name}"
    return (
        Workload(typical, f"{origin}, the most typical of {len(drawn.steps)} steps"),
        Workload((worst, *typical[1:]), f"{origin}, {how}"),
    )


def _assumed(config: RunConfig, rules: BatchRules, images: int) -> tuple[Workload, Workload]:
    """Samples of full length, with images and a label on a fixed fraction of the text tokens."""
    length, image_tokens = config.data.sequence_length, rules.num_image_tokens
    if images * image_tokens >= length:
        most = (length - 1) // image_tokens
        raise UserError(
            f"{images} images of {image_tokens} tokens and a label do not fit into "
            f"data.sequence_length, which is {length}: assume at most {most} images per sample, or "
            "give a report of prepare_data.py validate."
        )
    text = length - images * image_tokens
    sample = SampleShape(length, images, round(_LABEL_FRACTION * text))
    typical = rules.step([sample] * rules.global_batch_size)[0]
    what = f"rows of full length with {images} image{'' if images == 1 else 's'} per sample"
    assumed = Workload(typical, f"{what}, a label on {_LABEL_FRACTION:.0%} of the text tokens")
    if not rules.packing or not images:
        alike: tuple[SampleShape, ...] = (SampleShape(length, images, text),)
        size = rules.micro_batch_size
        largest = [alike * size] if rules.packing else [alike] * size
        origin = f"{what}, a label on all text tokens of the first micro-batch"
        return assumed, Workload((rules.micro_batch(largest), *typical[1:]), origin)
    # Short samples: as many images as the row has room for, as with captions.
    count = rules.max_length // (images * image_tokens + 1)
    each, more = divmod(rules.max_length, count)
    row = [_all_labels(each + (i < more), images, image_tokens) for i in range(count)]
    origin = f"rows of full length, {count * images} images in the first row"
    return assumed, Workload((rules.micro_batch([tuple(row)]), *typical[1:]), origin)


def _all_labels(tokens: int, images: int, image_tokens: int) -> SampleShape:
    return SampleShape(tokens, images, tokens - images * image_tokens)


def _most_typical(
    drawn: DrawnSteps, pool: SamplePool, rules: BatchRules
) -> tuple[MicroBatchShape, ...]:
    """The micro-batches of the drawn rank that is closest to the mean in all that costs.

    Tokens, images and labels are compared with the mean of the data, what depends on the order of
    samples with the mean of the drawn steps.
    """
    ranks = [own for step in drawn.steps for own in step]
    numbers = np.array([_costs(own) for own in ranks], float)
    means = numbers.mean(axis=0)
    expected, samples = pool.means(), rules.global_batch_size / rules.dp_size
    means[:3] = np.array([expected.tokens, expected.images, expected.labels]) * samples
    apart = ((numbers - means) / np.maximum(means, 1)) ** 2
    return ranks[int(apart.sum(axis=1).argmin())]


def _costs(own: tuple[MicroBatchShape, ...]) -> tuple[int, ...]:
    samples = [sample for one in own for sample in one.samples]
    return (
        sum(sample.tokens for sample in samples),
        sum(sample.images for sample in samples),
        sum(sample.labels for sample in samples),
        sum(one.positions for one in own),
        sum(sample.tokens**2 for sample in samples),
        len(own),
    )


def _worst(drawn: DrawnSteps, report: DataReport, rules: BatchRules) -> tuple[MicroBatchShape, str]:
    """The largest micro-batch, and a phrase that says how probable it is."""
    entries = SamplePool(report, rules.seed).entries()
    return _fullest_row(entries, drawn, rules) if rules.packing else _longest(entries, rules)


def _longest(
    entries: list[tuple[SampleShape, float]], rules: BatchRules
) -> tuple[MicroBatchShape, str]:
    """The longest samples that a mixture has, among equals those with most images and labels."""
    entries = sorted(entries, key=lambda entry: _size(entry[0]), reverse=True)
    longest = entries[0][0].tokens
    probability = sum(weight for one, weight in entries if one.tokens == longest)
    # At most so many samples of a kind as are drawn in a step on average, but at least one.
    rows: list[tuple[SampleShape, ...]] = []
    for one, weight in entries:
        available = max(1, round(weight * rules.global_batch_size))
        rows += [(one,)] * min(available, rules.micro_batch_size - len(rows))
        if len(rows) == rules.micro_batch_size:
            break
    rows += [rows[-1]] * (rules.micro_batch_size - len(rows))
    in_step = 1 - (1 - probability) ** rules.global_batch_size
    return rules.micro_batch(rows), (
        f"the longest together in the first micro-batch (a row of {longest:,} tokens is in "
        f"{_percent(in_step)} of the steps)"
    )


def _fullest_row(
    entries: list[tuple[SampleShape, float]], drawn: DrawnSteps, rules: BatchRules
) -> tuple[MicroBatchShape, str]:
    """A full row with the most images, of samples that a step can have together."""
    with_images = [entry for entry in entries if entry[0].images]
    with_images.sort(key=lambda entry: entry[0].tokens / entry[0].images)
    others = sorted(entries, key=lambda entry: _size(entry[0]), reverse=True)
    left = Counter[SampleShape]()
    for one, weight in entries:
        left[one] += max(1, round(weight * rules.global_batch_size))
    row: list[SampleShape] = []
    room = rules.max_length
    for one, _ in [*with_images, *others]:
        count = min(room // one.tokens, left[one], rules.global_batch_size - len(row))
        left[one] -= count
        row += [one] * count
        room -= count * one.tokens
    images = sum(one.images for one in row)
    most = [max(b.images for own in step for b in own) for step in drawn.steps]
    seen = sum(images <= number for number in most) / len(most)
    return rules.micro_batch([tuple(row)]), (
        f"a full row with the most images first ({images} images; {_percent(seen)} of the drawn "
        f"steps had such a row, the largest {max(most)})"
    )


def _size(one: SampleShape) -> tuple[int, int, int]:
    return one.tokens, one.images, one.labels


def _percent(fraction: float) -> str:
    """A percentage of few digits; ``100 %`` and ``0 %`` mean exactly that."""
    if 0 < fraction < 0.0001:
        return "less than 0.01 %"
    if 0.99 < fraction < 1:
        return f"{100 * min(fraction, 0.9999):.2f} %"
    return f"{100 * fraction:.2g} %" if 0 < fraction < 1 else f"{fraction:.0%}".replace("%", " %")
