"""Benchmarks: which samples a stack answers and how its answers are scored."""

from __future__ import annotations

BUILTIN: dict[str, str] = {
    "amber": "mitigate.benchmarks.amber:Amber",
    "chair": "mitigate.benchmarks.chair:Chair",
    "coco_caption": "mitigate.benchmarks.coco_caption:CocoCaption",
    "hallusionbench": "mitigate.benchmarks.hallusionbench:HallusionBench",
    "mme": "mitigate.benchmarks.mme:Mme",
    "mmhal": "mitigate.benchmarks.mmhal:Mmhal",
    "pope": "mitigate.benchmarks.pope:Pope",
    "testbed": "mitigate.benchmarks.testbed:Testbed",
}
"""Registered name -> ``module:class`` of the benchmarks that come with the project."""
