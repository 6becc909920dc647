"""Where a run is shown besides its own record. Records never depend on a tracker."""

from __future__ import annotations

#: Registered name -> ``module:class``.
BUILTIN = {
    "none": "mitigate.trackers.none:NoTracker",
    "wandb": "mitigate.trackers.wandb:WandbTracker",
}
