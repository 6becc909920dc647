"""Following the request rows that beam search moves from one place to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lineage:
    """Hears which row of the step before every row goes on from, and passes it on.

    With a cache, the search permutes the cache's rows, and says so there; without one, the prefixes tell.

    Parameters
    ----------
    samples
        Number of samples; the rows of one are side by side, and the search does not leave them.
    listener
        Called with ``[B]``, for every row the one that it continues.
    """

    def __init__(self, samples: int, listener: Callable[[Tensor], None]) -> None:
        self._samples, self._listener = samples, listener
        self._watched: Any = None
        self._ids: Tensor | None = None

    def follow(self, ids: Tensor, past: int, cache: Any) -> None:
        """Note a forward over columns ``past ...`` with this cache, before it runs."""
        if cache is not None:
            self._watch(cache)
        elif past == 0:
            self._compare(ids)

    def release(self) -> None:
        """Give the cache its own method back."""
        if self._watched is not None:
            del self._watched.reorder_cache
            self._watched = None

    def _watch(self, cache: Any) -> None:
        if cache is self._watched or not hasattr(cache, "reorder_cache"):
            return
        self.release()
        own = cache.reorder_cache

        def reorder(beams: Tensor) -> None:
            own(beams)
            self._listener(beams)

        cache.reorder_cache = reorder
        self._watched = cache

    def _compare(self, ids: Tensor) -> None:
        known, self._ids = self._ids, ids
        if known is None or known.shape[0] != ids.shape[0] or known.shape[1] >= ids.shape[1]:
            return
        prefixes = ids[:, : known.shape[1]]
        if torch.equal(prefixes, known):
            return
        sample = torch.arange(len(ids), device=ids.device) // (len(ids) // self._samples)
        same = (prefixes[:, None] == known).all(-1) & (sample[:, None] == sample)  # [B, B]
        if bool(same.any(1).all()):  # equal prefixes of a sample have equal pasts: any of them will do
            self._listener(same.int().argmax(1))
