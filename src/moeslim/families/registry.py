"""The families that moeslim knows, by the config's `model_type`. A new page is added here and in tests/tiny.py."""

from collections.abc import Mapping
from typing import Any

from moeslim.errors import FamilyError
from moeslim.families import (
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    gemma3_text,
    gemma4,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    gpt_oss,
    granitemoehybrid,
    hunyuan_v1_moe,
    lfm2_moe,
    llama,
    minimax_m2,
    mistral,
    mixtral,
    nemotron_h,
    olmo2,
    olmoe,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    qwen3_vl_moe,
    smollm3,
)
from moeslim.families.spec import Family

_PAGES = (
    *(qwen3_next, qwen3_moe, glm4_moe, qwen3_5_moe, deepseek_v3, mixtral, gpt_oss, olmoe, qwen2_moe),
    *(gemma4, qwen3_vl_moe, phimoe),
    *(deepseek_v2, glm4_moe_lite, glm_moe_dsa, minimax_m2),
    *(granitemoehybrid, lfm2_moe, nemotron_h),
    *(ernie4_5_moe, hunyuan_v1_moe),
    *(gemma3_text, llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3),
)
FAMILIES: dict[str, Family] = {page.SPEC.model_type: page.SPEC for page in _PAGES}


def family_of(config: Mapping[str, Any]) -> Family:
    """The page of facts for a raw config.json, by a wrapper's names where it is one; FamilyError if there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise FamilyError("config.json has no model_type; it must name the architecture, for example 'qwen3_next'")
    found = _page_of(model_type)
    if found is None:
        raise FamilyError(
            f"config.json: model_type {model_type!r} is not a family that moeslim knows "
            f"({', '.join(sorted(FAMILIES))}); a family is one page of facts in families/ (see CONTRIBUTING.md)"
        )
    if not isinstance(config.get("text_config"), Mapping):
        return found
    if found.wrapper is None:
        raise FamilyError(
            f"config.json has a text_config, and families/{found.model_type}.py knows no wrapper of {model_type!r}; "
            "use the text model's own release, or add the wrapper to the page"
        )
    return found.wrapped


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether a raw config.json is of a family that has a page."""
    return _page_of(config.get("model_type")) is not None


def _page_of(model_type: Any) -> Family | None:
    return next((page for page in FAMILIES.values() if model_type in (page.model_type, *page.more_types)), None)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What holds a text model's sizes: a wrapper's `text_config`, the raw config itself otherwise."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def with_text_config(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The raw config with another `text_config`."""
    return dict(text) if text_config(config) is config else {**config, "text_config": dict(text)}
