#!/usr/bin/env python3
"""Write the table of similar words that AMBER's captions are scored with (`benchmark.similarity`).

The official script compares spaCy's vectors of every two words it meets. All of them come from relation.json, so the
pairs above its threshold can be found once, where spaCy and the model are installed:

    pip install spacy && python -m spacy download en_core_web_lg
    python scripts/make_amber_similarity.py data/amber/relation.json amber_similarity.tsv
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

THRESHOLD = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description="write the pairs of similar words of AMBER's vocabulary")
    parser.add_argument("relation", type=Path, help="relation.json of AMBER")
    parser.add_argument("table", type=Path, help="file to write: word, other word, similarity, separated by tabs")
    parser.add_argument("--model", default="en_core_web_lg", help="the official script uses en_core_web_lg")
    options = parser.parse_args()

    import spacy

    model = spacy.load(options.model)
    associates = json.loads(options.relation.read_text(encoding="utf-8"))
    words = sorted({*associates, *(word for others in associates.values() for word in others)})
    documents = [model(word) for word in words]
    lines = [
        f"{first.text}\t{second.text}\t{similarity}\n"
        for first, second in combinations(documents, 2)
        if (similarity := float(first.similarity(second))) > THRESHOLD
    ]
    options.table.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} of {len(words) * (len(words) - 1) // 2} pairs are similar: {options.table}")


if __name__ == "__main__":
    main()
