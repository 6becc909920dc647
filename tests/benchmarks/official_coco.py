"""Small annotation files in exactly the format of COCO 2014, from a few lines of what is in the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)
CATEGORIES = _NAMES.split(", ")
_INFO = {"description": "COCO 2014 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2014}
_LICENCES = [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}]


def image(number: int, split: str) -> dict[str, object]:
    """Return a picture's entry."""
    name = f"COCO_{split}2014_{number:012d}.jpg"
    return {
        "license": 4,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{split}2014/{name}",
        "height": 48,
        "width": 64,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": "http://farm1.staticflickr.com/1/1_1_z.jpg",
        "id": number,
    }


def outline(number: int, category: str, index: int) -> dict[str, object]:
    """Return a segmentation's entry."""
    return {
        "segmentation": [[1.5, 2.25, 10.0, 2.25, 10.0, 12.5, 1.5, 12.5]],
        "area": 87.125,
        "iscrowd": 0,
        "image_id": number,
        "bbox": [1.5, 2.25, 8.5, 10.25],
        "category_id": CATEGORIES.index(category) + 1,
        "id": index,
    }


def write_coco(
    root: Path,
    pictures: Mapping[int, tuple[Sequence[str], Sequence[str]]],
    *,
    split: str = "val",
    drawn: bool = False,
) -> Path:
    """Write the annotations of pictures below a data folder.

    Parameters
    ----------
    root
        The folder of all data.
    pictures
        Id -> segmented categories, reference captions.
    split
        ``val`` or ``train``.
    drawn
        Whether to write a small JPEG of each picture, too.
    """
    folder = root / "coco" / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    images = [image(number, split) for number in pictures]
    head = {"info": _INFO, "images": images, "licenses": _LICENCES}
    outlines = [(number, name) for number, (names, _) in pictures.items() for name in names]
    captions = [(number, text) for number, (_, texts) in pictures.items() for text in texts]
    instances = {
        **head,
        "annotations": [outline(number, name, index) for index, (number, name) in enumerate(outlines)],
        "categories": [{"supercategory": "thing", "id": index + 1, "name": n} for index, n in enumerate(CATEGORIES)],
    }
    said = {
        **head,
        "annotations": [{"image_id": n, "id": index, "caption": text} for index, (n, text) in enumerate(captions)],
    }
    (folder / f"instances_{split}2014.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / f"captions_{split}2014.json").write_text(json.dumps(said), encoding="utf-8")
    if drawn:
        (root / "coco" / f"{split}2014").mkdir(exist_ok=True)
        for entry in images:
            Image.new("RGB", (64, 48), "gray").save(root / "coco" / f"{split}2014" / str(entry["file_name"]))
    return root
