"""What packed rows cannot do: everything whose result for a sample depends on its neighbours."""

from __future__ import annotations

from moiie_megatron.config.schema import RunConfig
from moiie_megatron.utils.errors import UserError


def check_packing(config: RunConfig) -> None:
    """Refuse ``data.packing`` together with what would change a sample's loss.

    Raises:
        UserError: The first such setting.
    """
    if not config.data.packing:
        return
    if config.moe.last_image_token_as_text:
        raise UserError(
            "data.packing is true but moe.last_image_token_as_text is true, which looks from "
            "one token to the next and so past the end of a sample: set one of them to false."
        )
    longrope, length = config.language.longrope, config.data.sequence_length
    if longrope is not None and length > longrope.original_max_position_embeddings:
        raise UserError(
            f"data.packing is true but data.sequence_length is {length} and language.longrope "
            f"changes its factors beyond {longrope.original_max_position_embeddings} positions, "
            "for all samples of a row: set data.packing to false, or data.sequence_length to at "
            f"most {longrope.original_max_position_embeddings}."
        )
