"""The memory that a calibration's statistics take beside the walk."""

from moeslim.calibrate.sums import sample_positions
from moeslim.checkpoint.reader import Reader
from moeslim.model.memory_check import BatchSize
from moeslim.model.walk import WalkSettings


def batch_size_of(reader: Reader, settings: WalkSettings, *, rows: int, length: int, removal: bool) -> BatchSize:
    """The batch size of a calibration on `rows` rows, with the sums of a layer or, in the end, those of all layers.

    Sums are float64: a layer's two Gram matrices, mean outputs and neurons of all experts, each once more while
    something is added. The shared sample is held, joined, and run through one expert. `removal` keeps the outputs of
    every candidate of a token, by expert and then by token, and works out its gate values.
    """
    shape, width = reader.shape, settings.dtype.itemsize
    experts, hidden, top_k = shape["experts"], shape["hidden"], shape["top_k"]
    sums = 8 * experts * (2 * experts + 2 * hidden + 2 * shape["expert_size"] + 16) + 64 * hidden
    sample = len(sample_positions(rows * length, experts=experts, top_k=top_k))
    held = sample * (2 * hidden * width + 8 * experts + 32 * experts)
    running = sample * (hidden * (width + 8) + 3 * shape["expert_size"] * width)
    watched = max(2 * sums + held + running, len(shape.keys) * sums)
    each = 4 * (2 * (top_k + 1) + 4) * hidden + 48 * top_k * (top_k + 1) if removal else 0
    return BatchSize(min(settings.rows_per_batch, rows), length, watched=watched, each=each)
