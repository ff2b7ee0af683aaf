"""Which part of a model every tensor belongs to, and which parts a training touches.

A part is the component that the family's page names, but all of the MTP head is `mtp`. A tied head is the embedding.
"""

from moeslim.distill.settings import TrainSettings
from moeslim.errors import RecipeError
from moeslim.families import STACKED, Shape, table


def parts_of(shape: Shape) -> dict[str, str]:
    """The part of every tensor by the name that `Student.disk_state` gives it."""
    rows = table(shape, STACKED)
    return {name: "mtp" if row.subtree == "mtp" else row.component for name, row in rows.items()}


def trained_parts(settings: TrainSettings, shape: Shape) -> set[str]:
    """The parts of this model that get gradients: those of `train_only` (empty: all) whose rate is not 0.

    Raises RecipeError for a part that the model does not have, and where nothing would be trained.
    """
    section = settings.distill
    present = list(dict.fromkeys(parts_of(shape).values()))
    for key, named in (("train_only", section.train_only), ("parts", section.parts)):
        for part in named:
            if part not in present:
                tied = part == "head" and shape.tied
                why = "its head is its embedding (tie_word_embeddings)" if tied else "it has none"
                raise RecipeError(
                    f"distill.{key} names {part} of a model where {why}; name some of {', '.join(present)}"
                )
    trained = set(section.train_only or present)
    trained -= {part for part, own in section.parts.items() if own.learning_rate == 0}
    if not trained:
        raise RecipeError("distill.parts gives every part that is trained a learning_rate of 0; let one of them learn")
    ends = (section.beta_start, section.beta_start if section.beta_schedule == "constant" else section.beta_end)
    if trained == {"mtp"} and not min(ends):
        raise RecipeError(
            f"distill.beta_start is {section.beta_start:g}, beta_end {section.beta_end:g}, and only mtp is trained: "
            "where beta is 0 nothing would train it; give both a value above 0"
        )
    return trained
