"""The families that moeslim knows, by the config's `model_type`. A new page is added here and in tests/tiny.py."""

from collections.abc import Mapping
from typing import Any

from moeslim.errors import FamilyError
from moeslim.families import (
    gemma3_text,
    glm4_moe,
    llama,
    mistral,
    olmo2,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
    smollm3,
)
from moeslim.families.spec import Family

_PAGES = (
    *(qwen3_next, qwen3_moe, glm4_moe, olmoe, qwen2_moe),
    *(gemma3_text, llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3),
)
FAMILIES: dict[str, Family] = {page.SPEC.model_type: page.SPEC for page in _PAGES}


def family_of(config: Mapping[str, Any]) -> Family:
    """The page of facts for a raw config.json; FamilyError when there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("config.json has no model_type; it must name the architecture, for example 'qwen3_next'")
    if model_type not in FAMILIES:
        raise FamilyError(
            f"config.json: model_type {model_type!r} is not a family that moeslim knows "
            f"({', '.join(sorted(FAMILIES))}); a family is one page of facts in families/ (see CONTRIBUTING.md)"
        )
    return FAMILIES[model_type]
