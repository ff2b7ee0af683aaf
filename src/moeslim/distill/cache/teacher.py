"""The cached teacher: a `distill.teacher.Teacher` that reads probabilities from files instead of running a model."""

from pathlib import Path

import numpy as np
import torch

from moeslim.artifacts.fingerprint import folder_fingerprint
from moeslim.checkpoint.config_json import read_config
from moeslim.data.tokens import TokenSet
from moeslim.distill.cache.folder import CacheFolder
from moeslim.distill.vocab_check import vocab_fingerprint
from moeslim.errors import DataError
from moeslim.families import text_config
from moeslim.losses import Outcomes


class CachedTeacher:
    """Hands out what a cache holds for the rows asked for; their tokens are not looked at (see `check_cache`)."""

    def __init__(self, cache: CacheFolder) -> None:
        self.cache = cache
        self.kd_name = "kd_sampled" if cache.identity.samples else "kd_topk"

    def __call__(self, rows: torch.Tensor, numbers: np.ndarray) -> Outcomes:
        probs = self.cache.probs(numbers)

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(rows.device)

        return Outcomes(
            tensor(probs.ids),
            tensor(probs.p),
            tensor(probs.rest).unsqueeze(-1),
            tensor(probs.sampled),
            tensor(probs.sampled_log_p),
        )


def check_cache(cache: CacheFolder, student: Path, *, tokens: TokenSet, teacher: Path | None = None) -> None:
    """DataError, saying what differs, where a cache is of another text, vocabulary (the student's) or teacher."""
    wanted: dict[str, object] = {
        "text": tokens.fingerprint,
        "rows": len(tokens),
        "sequence_length": tokens.sequence_length,
        "vocab_size": text_config(read_config(student))["vocab_size"],
    }
    if cache.identity.words is not None and (vocab := vocab_fingerprint(student)) is not None:
        wanted["words"] = vocab
    if teacher is not None:
        wanted["teacher"] = folder_fingerprint(teacher)
    if differences := cache.identity.differences(wanted):
        raise DataError(
            f"{cache.folder}: the cache is of something else: its {', its '.join(differences)}; give the one that was "
            "made of this text by this teacher, or make it with `moeslim cache-teacher`"
        )
