"""What config.json says beside sizes, checked before a model is built from it: types, signs, and names of code.

Sizes and the pattern of layers are the shape's to check (families/shape.py). A key that is missing or null means the
family's default; a key that is not known here travels on unread.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from moeslim.errors import CheckpointError

_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class _Rule(NamedTuple):
    allowed: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _token(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(_whole(one) and -1 <= one < 1 << 31 for one in ids)  # -1 is some releases' "none"


def _table(value: Any) -> bool:
    return isinstance(value, dict)


_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_TOKEN = _Rule("a token's number, or a list of them", _token)
_TABLE = _Rule("an object", _table)
_TEXT = _Rule("a text", lambda value: isinstance(value, str))
_POSITIVE = _Rule("a number above 0 and at most 1e30", lambda value: _number(value) and 0 < value <= 1e30)
_SHARE = _Rule("a number from 0 up to 1", lambda value: _number(value) and 0 <= value <= 1)
_RULES: dict[str, _Rule] = {
    "rms_norm_eps": _Rule("a number above 0 and at most 1", lambda value: _number(value) and 0 < value <= 1),
    "rope_theta": _POSITIVE,
    "partial_rotary_factor": _Rule("a number above 0 and at most 1", lambda value: _number(value) and 0 < value <= 1),
    "initializer_range": _Rule("a number from 0 up to 1000", lambda value: _number(value) and 0 <= value <= 1000),
    "attention_dropout": _SHARE,
    "max_position_embeddings": _Rule("a whole number above 0", lambda value: _whole(value) and 0 < value < 1 << 40),
    "num_nextn_predict_layers": _Rule("a whole number from 0 up", lambda value: _whole(value) and 0 <= value < 100),
    "hidden_act": _Rule(f"one of {', '.join(_ACTIVATIONS)}", lambda value: value in _ACTIVATIONS),
    **dict.fromkeys(("norm_topk_prob", "tie_word_embeddings", "attention_bias", "use_cache"), _FLAG),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _TOKEN),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config", "text_config"), _TABLE),
    **dict.fromkeys(("model_type", "torch_dtype", "dtype"), _TEXT),
}
_ROPE_RULES: dict[str, _Rule] = {
    "rope_theta": _POSITIVE,
    "partial_rotary_factor": _RULES["partial_rotary_factor"],
    "rope_type": _Rule(f"one of {', '.join(_ROPES)}", lambda value: value in _ROPES),
    "type": _Rule(f"one of {', '.join(_ROPES)}", lambda value: value in _ROPES),
    "factor": _Rule("a number of at least 1", lambda value: _number(value) and 1 <= value <= 1e6),
}


def check_values(config: Mapping[str, Any], where: Path | str) -> None:
    """CheckpointError for the first value that no model can be built from, or that names code to be fetched."""
    text: Any = config.get("text_config")
    inside = ((f"text_config.{place}", *rest) for place, *rest in _checked(text)) if _table(text) else ()
    for place, value, rule in chain(
        _checked(config), inside
    ):  # lazily: a table that is none is found before it is read
        if value is not None and not rule.holds(value):
            raise CheckpointError(f"{where}: {place} must be {rule.allowed}, found {str(value)[:60]!r}")
    for key, value in config.items():
        if "_implementation" in key and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"{where}: {key} is {value[:60]!r}, code that would be fetched from the hub and run; remove the key"
            )


def _checked(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, _Rule]]:
    for key, rule in _RULES.items():
        yield key, config.get(key), rule
    for table in ("rope_parameters", "rope_scaling"):
        for key, rule in _ROPE_RULES.items():
            yield f"{table}.{key}", (config.get(table) or {}).get(key), rule
    yield from _rotary(config)


def _rotary(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, _Rule]]:
    """The rotated part of a head is made of pairs."""
    nested = config.get("rope_scaling") or config.get("rope_parameters") or {}
    head_dim, share = config.get("head_dim"), nested.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if isinstance(head_dim, int) and isinstance(share, int | float):
        pairs = _Rule("an even number of channels, at least 2", lambda value: value >= 2 and value % 2 == 0)
        yield "head_dim x partial_rotary_factor", int(head_dim * share), pairs
