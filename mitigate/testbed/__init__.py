"""The embedded testbed: a small drawn world and a small LLaVA model trained on it.

Importing this package, `world`, `draw` and `language` loads neither torch nor transformers; `model`, `train`,
`evaluate` and `probe` do.
"""

from __future__ import annotations
