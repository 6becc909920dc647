"""Does VCD keep mitigate's contract, and do its presets say what the README says?"""

import pytest
from mitigate.testing import parametrize_with_checks

from mitigate_vcd.vcd import VCD


@parametrize_with_checks([VCD])
def test_vcd_conforms(method, check):
    check(method)


@pytest.mark.parametrize(
    ("preset", "alpha", "beta", "streams"),
    [
        ("paper", 1.0, 0.1, 1),
        ("fallback", 0.5, 0.1, 1),
        ("pope_script", 1.0, 0.2, 1),
        ("uncut", 1.0, 0.0, 1),
        ("cut_off", 0.0, 0.1, 0),
    ],
)
def test_presets(preset, alpha, beta, streams):
    method = VCD.preset(preset)
    assert (method.alpha, method.beta, method.noise_step) == (alpha, beta, 500)
    assert len(method.branches()) == streams
