"""Families by name, as typed values; ``config/families.py`` lists them."""

from __future__ import annotations

from moiie_megatron.config.families import LANGUAGE_FAMILIES, VISION_FAMILIES, load_family
from moiie_megatron.families.family import ChatFormat, LanguageFamily, VisionFamily


def language_family(name: str) -> LanguageFamily:
    """The family that ``language.family`` names."""
    family = load_family(LANGUAGE_FAMILIES, name)
    assert isinstance(family, LanguageFamily) and family.name == name, family
    return family


def vision_family(name: str) -> VisionFamily:
    """The family that ``vision.family`` names."""
    family = load_family(VISION_FAMILIES, name)
    assert isinstance(family, VisionFamily) and family.name == name, family
    return family


def chat_formats() -> dict[str, ChatFormat]:
    """Every family's chat formats by name."""
    families = (language_family(name) for name in LANGUAGE_FAMILIES)
    return {chat.name: chat for family in families for chat in family.chat_formats}
