"""What a model can do, with the error of every figure: text, agreement, routing, drafting, speed; records as JSON."""

from moeslim.evaluate.pairs import paired
from moeslim.evaluate.record import Figure, Record, difference, mean, ratio
from moeslim.evaluate.run import evaluate, side_by_side
from moeslim.evaluate.settings import Settings

__all__ = ["Figure", "Record", "Settings", "difference", "evaluate", "mean", "paired", "ratio", "side_by_side"]
