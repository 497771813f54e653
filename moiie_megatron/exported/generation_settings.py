"""Settings of generation as a caller gives them, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moiie_megatron.utils.errors import UserError

# Answers could not be told apart with them, or ``ExportedModel`` sets them itself.
_OWN: Final = ("max_length", "max_new_tokens", "num_return_sequences", "return_dict_in_generate")
# Checked by transformers only while it generates.
_PROCESSORS: Final = {
    "temperature": "TemperatureLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
}


def generation_settings(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings for ``generate``; greedy where ``do_sample`` is not given.

    Args:
        given: Settings of transformers' ``GenerationConfig``.  A ``temperature`` of 0 is greedy.

    Raises:
        UserError: An unknown setting, one that cannot be given here, or a wrong value.
    """
    import transformers
    from transformers import GenerationConfig

    settings = dict(given or {})
    known = GenerationConfig()
    for name in settings:
        if name in _OWN or name.startswith("_") or not hasattr(known, name):
            raise UserError(
                f"{name} is no setting of generation that can be given here: use one of "
                "transformers' GenerationConfig, such as do_sample, temperature or num_beams."
            )
    if settings.get("temperature") == 0:
        del settings["temperature"]
        settings["do_sample"] = False
    settings.setdefault("do_sample", False)
    try:
        GenerationConfig(**settings)
        for name in _PROCESSORS.keys() & settings.keys():
            if isinstance(settings[name], int) and name != "top_k":
                settings[name] = float(settings[name])
            getattr(transformers, _PROCESSORS[name])(settings[name])
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"A setting of generation is wrong ({reason}): correct it.") from error
    return settings
