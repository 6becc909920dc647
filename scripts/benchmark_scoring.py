"""How long scoring takes: 100,000 POPE answers and 5,000 CHAIR captions, as a user runs it.

    python scripts/benchmark_scoring.py [--only pope|chair] [--lemmatizer closed] [--profile]

Writes files in the official formats into a temporary folder, runs `mitigate score` on them as a process of its own
(start-up, reading, matching, scoring, 10,000 resamples, printing), and times the phases inside one process as well.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mitigate.cli.scoring import paused_collection
from mitigate.data.predictions import match, read_predictions
from mitigate.registry import benchmarks
from mitigate.statistics import intervals

SPLITS = ("random", "popular", "adversarial")
REPLIES = ("Yes", "No", "Yes, there is.", "No, there is no such thing in the image.", "I am not sure.", "yes", "")
THINGS = ("person", "dog", "cat", "car", "bus", "hot dog", "dining table", "chair", "bicycle", "traffic light", "tie")
FILLERS = ("A photo of", "beside", "In the background there is", "The scene shows", "close to", "who is holding")


def write_pope(root: Path, answers: int, pictures: int) -> None:
    """Write three splits of questions and an answer to each."""
    rng = random.Random(0)
    (root / "pope").mkdir(parents=True)
    each = answers // len(SPLITS) + 1
    with (root / "answers.jsonl").open("w") as predictions:
        left = answers
        for split in SPLITS:
            with (root / "pope" / f"coco_pope_{split}.json").open("w") as questions:
                for number in range(1, min(each, left) + 1):
                    row = {
                        "question_id": number,
                        "image": f"COCO_val2014_{number % pictures:012}.jpg",
                        "text": f"Is there a {rng.choice(THINGS)} in the image?",
                        "label": ("yes", "no")[number % 2],
                    }
                    questions.write(json.dumps(row) + "\n")
                    answer = {"id": f"{split}/{number}", "text": rng.choice(REPLIES)}
                    predictions.write(json.dumps(answer) + "\n")
            left -= min(each, left)


def write_chair(root: Path, captions: int) -> None:
    """Write COCO annotations of as many pictures, the list of them, and a caption of about 90 words for each."""
    rng = random.Random(0)
    folder = root / "coco" / "annotations"
    folder.mkdir(parents=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(THINGS, start=1)]
    for split, start in (("val", 1), ("train", 500_001)):
        ids = range(start, start + (captions if split == "val" else 10))
        images = [{"id": number, "file_name": f"COCO_{split}2014_{number:012}.jpg"} for number in ids]
        instances = [
            {"id": number * 3 + part, "image_id": number, "category_id": rng.randint(1, len(THINGS))}
            for number in ids
            for part in range(3)
        ]
        references = [
            {
                "id": number * 5 + part,
                "image_id": number,
                "caption": " ".join(f"{rng.choice(FILLERS)} a {rng.choice(THINGS)}" for _ in range(3)) + ".",
            }
            for number in ids
            for part in range(5)
        ]
        for kind, rows in (("instances", instances), ("captions", references)):
            content = {"images": images, "annotations": rows, "categories": categories}
            (folder / f"{kind}_{split}2014.json").write_text(json.dumps(content))
    (root / "manifest.txt").write_text("".join(f"{number}\n" for number in range(1, captions + 1)))
    with (root / "answers.jsonl").open("w") as predictions:
        for number in range(1, captions + 1):
            words = " ".join(f"{rng.choice(FILLERS)} a {rng.choice(THINGS)}." for _ in range(18))
            predictions.write(json.dumps({"id": number, "text": words}) + "\n")


def timed(name: str, act: Callable[[], Any]) -> Any:
    """Run, print how many seconds it took and how many of them the processor worked, and return the result."""
    start, worked = time.perf_counter(), time.process_time()
    result = act()
    print(f"  {name:<20} {time.perf_counter() - start:6.2f} s, {time.process_time() - worked:6.2f} s of processor")
    return result


def phases(name: str, root: Path, parameters: dict[str, Any]) -> None:
    """Time the parts of scoring in this process."""
    benchmark = benchmarks().get(name)(data_dir=str(root), **parameters)
    path = root / "answers.jsonl"
    samples = timed("reading the data", benchmark.samples)
    predictions = timed("reading the answers", lambda: read_predictions(path, str(path)))
    records = timed("matching", lambda: match(benchmark, samples, predictions, str(path), partial=False))
    counts = timed("scoring", lambda: benchmark.counts(records))
    timed("10,000 resamples", lambda: intervals(counts, benchmark.all_metrics()))


def children() -> float:
    """Return how long the processor has worked for processes that this one started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def process(name: str, root: Path, parameters: dict[str, Any]) -> None:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "mitigate", "score", name, "--predictions", str(root / "answers.jsonl")]
    command += ["--data", str(root), "--json", *(f"{key}={value}" for key, value in parameters.items())]
    start, worked = time.perf_counter(), children()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = time.perf_counter() - start
    found = json.loads(done.stdout)
    print(f"{name}: {found['n_samples']:,} answers about {found['n_images']:,} pictures")
    print(f"  {'whole process':<20} {seconds:6.2f} s, {children() - worked:6.2f} s of processor")


def main() -> None:
    """Time both benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=5_000, help="that the POPE questions are about")
    parser.add_argument("--captions", type=int, default=5_000)
    parser.add_argument("--lemmatizer", default="wordnet", help="of CHAIR; wordnet needs nltk's data")
    parser.add_argument("--only", choices=("pope", "chair"))
    parser.add_argument("--profile", action="store_true", help="show where the phases spend their time")
    options = parser.parse_args()
    for name in ("pope", "chair"):
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            if name == "pope":
                write_pope(root, options.answers, options.pictures)
                parameters: dict[str, Any] = {}
            else:
                write_chair(root, options.captions)
                parameters = {"manifest": str(root / "manifest.txt"), "lemmatizer": options.lemmatizer}
            process(name, root, parameters)
            profile = cProfile.Profile()
            if options.profile:
                profile.enable()
            with paused_collection():
                phases(name, root, parameters)
            if options.profile:
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
