"""Learning from text what each layer, channel and expert does: one walk through the model, sums in float64.

Import from the files themselves (`from moeslim.calibrate.run import calibrate`): they need torch and transformers.
"""
