"""Files that survive kills: fingerprints, commit-last writing, the lock of a run folder and its finished stages.

Import from the files themselves (`from moeslim.artifacts.commit import committed_folder`): each says one thing.
"""
