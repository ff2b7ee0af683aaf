"""A teacher's output distributions on a packed text, stored once on disk and reused by every training."""

from moeslim.distill.cache.folder import CacheFolder, Identity
from moeslim.distill.cache.make import CacheSettings, make_cache

__all__ = ["CacheFolder", "CacheSettings", "Identity", "make_cache"]
