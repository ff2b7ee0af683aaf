"""Decisions that need the live layer: alignment, rho, router rows, sequential cutting, the probe.

Import from the files themselves (`from moeslim.search.run import ExpertSearch`): they need torch and transformers.
"""
