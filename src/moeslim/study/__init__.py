"""A grid of runs: every variant of a base recipe with every seed, and one table of what differs beyond the noise.

OUT/recipes/<variant>-seed-N.yaml   the recipe of one cell of the grid
OUT/runs/<variant>-seed-N/          its run folder, as `moeslim run` makes it; OUT/logs/<...>.txt: its output
OUT/stages/<variant>-seed-N.json    that it is finished, from which recipe
OUT/study.json, study.html, table.md
"""
