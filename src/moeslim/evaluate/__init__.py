"""What a model can do, with the error of every figure: text, agreement, routing, drafting, speed; records as JSON."""

from moeslim.evaluate.pairs import paired
from moeslim.evaluate.record import Record
from moeslim.evaluate.run import evaluate, side_by_side
from moeslim.evaluate.settings import Settings

__all__ = ["Record", "Settings", "evaluate", "paired", "side_by_side"]
