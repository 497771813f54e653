"""Whether a run has come to its end, for scripts that start it again until it has."""

from __future__ import annotations

from moiie_megatron.checkpoint.find_latest import newest_whole
from moiie_megatron.checkpoint.save_load import load_common
from moiie_megatron.config.schema import RunConfig
from moiie_megatron.data.stream.build import build_dataset
from moiie_megatron.training.loop import total_steps


def steps_done(config: RunConfig) -> tuple[int, int]:
    """Steps of the newest checkpoint of a run (0 without one), and of the whole run.

    Raises:
        UserError: The data set, whose size counts in epochs, or every checkpoint is damaged.
    """
    newest, _ = newest_whole(config.output)
    done = 0 if newest is None else int(load_common(newest)["progress"]["step"])
    # Records take a while to read: only where the steps follow from them.
    num_samples = build_dataset(config).blend.epoch_size if config.train.steps is None else 0
    return done, total_steps(config, num_samples)
