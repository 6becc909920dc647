"""Small data of our own in exactly the official formats of POPE, MME and HallusionBench, with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from mitigate.metrics.mme import TASKS

OBJECTS = ("dog", "fire hydrant", "apple", "bus", "umbrella", "wine glass")
POPE_FILES = {"coco": "coco_pope_{}.json", "aokvqa": "aokvqa_pope_seem_{}.json", "gqa": "gqa_pope_seem_{}.json"}
#: Tasks whose folder in MME's release has its pictures in a folder of its own.
MME_NESTED = ("posters", "celebrity", "scene", "landmark", "artwork")


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade * 37 % 256, 90, 200)).save(path)


def pope_rows(dataset: str, split: str, pictures: int) -> list[dict[str, Any]]:
    """Two questions on each picture: one object that is there, one that is not; the latter depends on the split."""
    rows = []
    shift = ("random", "popular", "adversarial").index(split) + 1
    for index in range(pictures):
        name = f"{2400000 + index}.jpg" if dataset == "gqa" else f"COCO_val2014_{310000 + index:012}.jpg"
        for thing, label in ((OBJECTS[index % 6], "yes"), (OBJECTS[(index + shift) % 6], "no")):
            article = "an" if thing[0] in "aeiou" else "a"
            text = f"Is there {article} {thing} in the image?"
            rows.append({"question_id": len(rows) + 1, "image": name, "text": text, "label": label})
    return rows


def write_pope(root: Path, dataset: str = "coco", pictures: int = 3) -> Path:
    """Write the three files of a dataset, COCO's as JSON lines and the others as an indented array, and pictures."""
    folder = root / "pope"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("random", "popular", "adversarial"):
        rows = pope_rows(dataset, split, pictures)
        text = "\n".join(map(json.dumps, rows)) + "\n" if dataset == "coco" else json.dumps(rows, indent=4)
        (folder / POPE_FILES[dataset].format(split)).write_text(text, encoding="utf-8")
        for index, row in enumerate(rows):
            picture(root / ("gqa/images" if dataset == "gqa" else "coco/val2014") / row["image"], index)
    return folder


def mme_lines(task: str, pictures: int) -> list[str]:
    return [
        f"{index:04}.jpg\tIs this {what} {task} {index}? Please answer yes or no.\t{label}"
        for index in range(pictures)
        for what, label in (("a", "Yes"), ("no", "No"))
    ]


def write_mme(root: Path, tasks: tuple[str, ...] = TASKS, pictures: int = 2) -> Path:
    """Write one text file per task, a pair of lines per picture, and the pictures as the release has them."""
    folder = root / "mme"
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        nested = folder / "images" / task / ("images" if task in MME_NESTED else "")
        for index in range(pictures):
            picture(nested / f"{index:04}.jpg", index)
        (folder / f"{task}.txt").write_text("\n".join(mme_lines(task, pictures)) + "\n", encoding="utf-8")
    return folder


def hallusionbench_rows() -> list[dict[str, Any]]:
    """Three sets: two with pictures only, one that is also asked about without its picture."""
    rows = []
    for category, subcategory, set_id, figures in (
        ("VD", "illusion", "0", (("1", "0"), ("2", "1"))),
        ("VD", "math", "3", (("1", "0"), ("2", "1"), ("2", "2"))),
        ("VS", "chart", "0", (("0", "0"), ("1", "1"), ("2", "2"))),
    ):
        for visual_input, figure_id in figures:
            for question_id in ("0", "1"):
                right = "1" if (visual_input != "2") == (question_id == "0") else "0"
                path = f"./{category}/{subcategory}/{set_id}_{figure_id}.png"
                rows.append(
                    {
                        "category": category,
                        "subcategory": subcategory,
                        "visual_input": visual_input,
                        "set_id": set_id,
                        "figure_id": figure_id,
                        "sample_note": "note",
                        "question_id": question_id,
                        "question": f"Is {subcategory} {question_id} so?",
                        "gt_answer_details": f"It is {'so' if right == '1' else 'not so'}.",
                        "gt_answer": right,
                        "filename": None if visual_input == "0" else path,
                    }
                )
    return rows


def write_hallusionbench(root: Path) -> Path:
    """Write the file, one array in one line, and its pictures."""
    folder = root / "hallusionbench"
    folder.mkdir(parents=True, exist_ok=True)
    rows = hallusionbench_rows()
    for index, row in enumerate(rows):
        if row["filename"]:
            picture(folder / "hallusion_bench" / row["filename"], index)
    (folder / "HallusionBench.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder
