"""A run folder as one page and a model card: reads every artifact, computes nothing that is not in them."""

from moeslim.report.card import write_card
from moeslim.report.collect import RunFacts, collect
from moeslim.report.page import write_page

__all__ = ["RunFacts", "collect", "write_card", "write_page"]
