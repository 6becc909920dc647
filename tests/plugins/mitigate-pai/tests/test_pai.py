"""Does PAI keep mitigate's contract, and do its presets say what the README says?"""

import pytest
from mitigate.testing import parametrize_with_checks

from mitigate_pai.pai import PAI


@parametrize_with_checks([PAI])
def test_pai_conforms(method, check):
    check(method)


@pytest.mark.parametrize(
    ("preset", "alpha", "gamma", "cut_off", "streams"),
    [
        ("paper", 0.2, 1.1, 0.1, 1),
        ("command_line", 0.2, 2.0, 0.1, 1),
        ("long_captions", 0.5, 1.1, 0.1, 1),
        ("as_printed", 0.2, 1.1, 0.1, 1),
        ("attention", 0.2, 1.0, 0.0, 0),
        ("cut_off", 0.0, 1.0, 0.1, 0),
    ],
)
def test_presets(preset, alpha, gamma, cut_off, streams):
    method = PAI.preset(preset)
    assert (method.alpha, method.gamma, method.cut_off) == (alpha, gamma, cut_off)
    assert len(method.branches()) == streams
