"""A Trainer that cannot be built is the user's to fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mitigate.errors import ConfigError
from mitigate.runner.module import predict


@pytest.mark.parametrize(
    "changes",
    [
        {"accelerator": "foo"},
        {"accelerator": "tpu"},
        {"strategy": "foo"},
        {"strategy": "fsdp"},
        {"devices": 0},
        {"devices": -1},
    ],
)
def test_a_trainer_that_cannot_be_built(tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", **changes}
    ((key, value),) = changes.items()
    module: Any = None
    with pytest.raises(ConfigError, match=rf"trainer.{key}={value}.*\nuse trainer=cpu") as caught:
        predict(module, module, asked, gradients=False, folder=tmp_path)
    assert len(str(caught.value).splitlines()) == 2
