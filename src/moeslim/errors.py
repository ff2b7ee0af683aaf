"""What can go wrong through the user's input, one class per place where it is found.

Every message says where, what was found, what is allowed and what to do next; the CLI prints it without a traceback
and exits with `exit_code`.
"""


class MoeslimError(Exception):
    """An input that cannot be used, or a run that cannot continue."""

    exit_code = 1


class CheckpointError(MoeslimError):
    """A checkpoint's files, headers, names, shapes, dtypes or values are not what they must be."""


class FamilyError(MoeslimError):
    """The model's architecture is unknown, or its config contradicts itself."""


class PlanError(MoeslimError):
    """A plan that cannot work, or whose result could not be served."""


class DataError(MoeslimError):
    """Text, tokens or tokenizer that cannot be used."""


class RecipeError(MoeslimError):
    """A recipe or an override with an unknown key or an impossible value."""


class ResourceError(MoeslimError):
    """Not enough disk or memory for what was asked."""


class RunError(MoeslimError):
    """A run folder that is in use, not empty, or does not fit what is to be resumed."""


class TrainingError(MoeslimError):
    """Training met a NaN or Inf before the weights were touched."""


class Interrupted(MoeslimError):  # noqa: N818 - not an error: the user asked for it
    """Stopped by Ctrl-C or SIGTERM after saving."""

    exit_code = 130
