"""A teacher's word on a packed text, kept on disk: made once, read at random by every training after it."""

from moeslim.distill.cache.folder import CacheFolder, Identity
from moeslim.distill.cache.make import Ask, make_cache

__all__ = ["Ask", "CacheFolder", "Identity", "make_cache"]
