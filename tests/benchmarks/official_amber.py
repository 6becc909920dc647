"""Small files in exactly the formats of AMBER's repository: JSON indented by four, words without a last line end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

RELATION = {
    "sky": [],
    "dog": ["puppy"],
    "cat": [],
    "person": ["people", "man", "individual"],
    "forest": ["tree", "leave"],
    "tree": ["forest", "leave"],
    "sea": ["water", "lake"],
    "lake": ["water", "sea"],
    "ship": [],
    "boat": [],
    "camera": [],
}
SAFE = ("orange", "camera", "individual")

CAPTION = "Describe this image."
#: Picture number -> what is in it, and what models like to invent.
CAPTIONS: dict[int, tuple[list[str], list[str]]] = {
    1: (["dog", "sky", "sea"], ["cat", "person"]),
    2: (["ship", "ship", "lake"], ["boat", "dog", "tree"]),
}
#: Picture number, type, question, answer.
QUESTIONS = [
    (1, "discriminative-attribute-state", "Is the sky sunny in this image?", "yes"),
    (1, "discriminative-attribute-number", "Are there two dogs in this image?", "no"),
    (2, "discriminative-attribute-action", "Does the ship sail in this image?", "yes"),
    (1, "discriminative-hallucination", "Is there a cat in this image?", "no"),
    (2, "discriminative-hallucination", "Is there a dog in this image?", "no"),
    (2, "discriminative-relation", "Is there direct contact between the ship and the lake?", "yes"),
    (1, "relation", "Is there direct contact between the dog and the sky?", "no"),
]


def write_amber(
    folder: Path,
    captions: Mapping[int, tuple[list[str], list[str]]] = CAPTIONS,
    questions: Sequence[tuple[int, str, str, str]] = QUESTIONS,
    *,
    pictures: bool = True,
) -> Path:
    """Write the files into ``folder/amber`` and return it; ids count on as in the original."""
    data = folder / "amber"
    (data / "image").mkdir(parents=True)
    queries: list[dict[str, Any]] = []
    truths: list[dict[str, Any]] = []
    for picture, (truth, hallu) in captions.items():
        queries.append({"id": len(queries) + 1, "image": f"AMBER_{picture}.jpg", "query": CAPTION})
        truths.append({"id": len(truths) + 1, "type": "generative", "truth": truth, "hallu": hallu})
    for picture, kind, question, answer in questions:
        queries.append({"id": len(queries) + 1, "image": f"AMBER_{picture}.jpg", "query": question})
        truths.append({"id": len(truths) + 1, "type": kind, "truth": answer, "hallu": []})
    for name, content in (("query_all", queries), ("annotations", truths), ("relation", RELATION)):
        (data / f"{name}.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    (data / "safe_words.txt").write_text("\n".join(SAFE), encoding="utf-8")
    for picture in {query["image"] for query in queries} if pictures else ():
        Image.new("RGB", (12, 8), "white").save(data / "image" / picture)
    return data
