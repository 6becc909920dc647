"""The script that makes AMBER's table of similar words, with a stand-in for spaCy; the benchmark reads the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mitigate.metrics.amber_words import read_words

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_amber_similarity.py"
SPACY = """
VALUES = {("boat", "ship"): 0.88, ("child", "kid"): 0.8, ("lake", "sea"): 0.81}

class Word:
    def __init__(self, text):
        self.text = text

    def similarity(self, other):
        return VALUES.get((self.text, other.text), 0.1)

def load(name):
    assert name == "en_core_web_lg"
    return Word
"""


def test_pairs_above_the_threshold_are_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "spacy.py").write_text(SPACY)
    relation = {"ship": ["boat"], "sea": ["lake"], "child": ["kid"]}
    (tmp_path / "relation.json").write_text(json.dumps(relation))
    (tmp_path / "safe_words.txt").write_text("orange")
    command = [sys.executable, str(SCRIPT), "relation.json", "table.tsv"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 of 15 pairs are similar")
    words = read_words(tmp_path, tmp_path / "table.tsv")
    assert words.alike == {("boat", "ship"), ("ship", "boat"), ("lake", "sea"), ("sea", "lake")}
