"""``mitigate trace``: one picture, one question, and a readable account of what every method did."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mitigate.cli.devices import check_accelerator
from mitigate.cli.exits import OK, USER_ERROR
from mitigate.cli.options import read_options
from mitigate.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mitigate.adapters import LoadedModel
    from mitigate.compose import ResolvedRun
    from mitigate.core.handle import Handle
    from mitigate.report.trace import Answer, Raster, Traced

_DRAWN = "testbed:"
_OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.]*(@[\w.]*)?=\S|[+~]+[\w.]+$")

HELP = """\
Usage: mitigate trace PICTURE "QUESTION" [--all] [--json] [out=FOLDER] [KEY=VALUE ...]

Ask one question about one picture, without and with a stack of methods, and print step by step what every method did:
its candidates, scores and thresholds, flagged layers, anchors, masses. Writes trace.json (every record), pictures
with what the methods saw or chose drawn over the patches, and trace.html (one page, no scripts) into a folder.

  PICTURE          a file, or testbed:test-0, testbed:validation-7, ...: a scene of the embedded testbed
  QUESTION         the user's text, in quotes
  out=FOLDER       where to write; default runs/trace-STACK-DIGEST

Options
  --all            one line per step and layer instead of one per step
  --json           print the content of trace.json instead of tables
  -h, --help       this text

Examples
  mitigate trace testbed:test-0 "Describe the image." 'methods=[NAME]'
  mitigate trace photo.jpg "Is there a dog?" model=llava-1.5-7b stack=NAME decoding.max_new_tokens=16

Model, methods, decoding and seed as for `mitigate run` (see its --help); there is no benchmark.
"""


def trace(arguments: Sequence[str], console: Console) -> int:
    """Trace one answer."""
    options = read_options("trace", arguments, ("json", "all"))
    if options.help or not options.overrides:
        _say(console, HELP)
        return OK if options.help else USER_ERROR
    name, question, rest = _positional(options.overrides)
    outs = [item.partition("=")[2] for item in rest if item.startswith("out=")]
    if any(not out for out in outs):
        raise ConfigError("out= needs a folder: out=FOLDER")
    for item in rest:
        if re.match(r"[+~]*benchmark\b", item):
            raise ConfigError(f"{item}: a trace has one picture and one question, no benchmark; drop it")
    from mitigate.compose import compose_run
    from mitigate.compose.checks import check_family

    picture = read_picture(name)
    resolved = compose_run([item for item in rest if not item.startswith("out=")])
    check_family(resolved.config, resolved.facts)
    if int(resolved.config["decoding"]["num_beams"]) > 1:
        beams = resolved.config["decoding"]["num_beams"]
        raise ConfigError(f"decoding.num_beams={beams}: a trace follows one sequence; use decoding=greedy")
    check_accelerator(str(resolved.config["trainer"]["accelerator"]), "trainer.accelerator")
    folder = Path(outs[-1]) if outs else _folder(resolved, name, question)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file; name a folder")
    traced = collect(resolved, name, picture, question)
    from mitigate.report.trace import write

    try:
        files = write(folder, traced, every=options.all)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error
    if options.json:
        from mitigate.jsonfiles import to_json

        _say(console, json.dumps(to_json(traced.as_json()), ensure_ascii=False) + "\n")
        return OK
    show(traced, console, every=options.all)
    shown = ", ".join(path.name for path in files)
    _say(console, f"Written to {folder}: {shown}\n")
    return OK


def _positional(arguments: Sequence[str]) -> tuple[str, str, list[str]]:
    """Separate picture and question from overrides.

    Raises
    ------
    ConfigError
        If one of them is missing.
    """
    usage = 'write mitigate trace PICTURE "QUESTION" [KEY=VALUE ...]'
    name = arguments[0]
    if _OVERRIDE.match(name) and not Path(name).exists():
        raise ConfigError(f"mitigate trace takes a picture first, not {name!r}; {usage}")
    if len(arguments) < 2 or (_OVERRIDE.match(arguments[1]) and " " not in arguments[1].partition("=")[0]):
        raise ConfigError(f"mitigate trace needs a question after the picture; {usage}")
    if not arguments[1].strip():
        raise ConfigError(f"the question is empty; {usage}")
    stray = next((item for item in arguments[2:] if "=" not in item and not item.startswith(("+", "~"))), None)
    if stray is not None:
        raise ConfigError(f"{stray!r} is no KEY=VALUE; put the whole question in quotes: {usage}")
    return name, arguments[1], list(arguments[2:])


def read_picture(name: str) -> Image:
    """Open a picture, or draw a scene of the testbed.

    Raises
    ------
    DataError
        If there is no such file or scene, or it is no picture.
    """
    if name.startswith(_DRAWN):
        return _drawn(name.removeprefix(_DRAWN))
    from PIL import Image, UnidentifiedImageError

    path = Path(name)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"picture {name} {kind}; name a picture file, or {_DRAWN}test-0 for a drawn scene")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{name} is no picture that can be read; use PNG, JPEG or WebP") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"picture {name} cannot be read: {str(error).splitlines()[0]}") from error


def _drawn(scene_name: str) -> Image:
    from mitigate.testbed.draw import draw
    from mitigate.testbed.world import SPLITS, scene

    split, _, index = scene_name.rpartition("-")
    for known in SPLITS:
        if known == split and index.isdecimal():
            return draw(scene(known, int(index)))
    raise DataError(f"{scene_name!r} is no scene of the testbed; scenes are called {_DRAWN}test-0, validation-7, ...")


def _folder(resolved: ResolvedRun, name: str, question: str) -> Path:
    from mitigate.jsonfiles import content_hash

    digest = content_hash([resolved.digest, name, question])[:6]
    stack = re.sub(r"[^\w.+-]+", "-", resolved.stack_name)
    return Path(resolved.config["runs_dir"]) / f"trace-{stack}-{digest}"


# ------------------------------------------------------------------------------------------------------- generating


def collect(resolved: ResolvedRun, name: str, picture: Image, question: str) -> Traced:
    """Answer without and with the stack, and collect what the methods report."""
    import torch

    from mitigate.core.stack import Stack
    from mitigate.diagnostics.attention_watch import AttentionWatch
    from mitigate.report.trace import WATCH, Traced
    from mitigate.report.trace_text import Known
    from mitigate.runner.batches import generate_arguments
    from mitigate.runner.single import ModelCache
    from mitigate.runner.standalone import notes_of

    if WATCH in resolved.methods:
        raise ConfigError(f"{WATCH!r} is the key of the built-in attention watch; give the method another key")
    loaded = ModelCache().get(resolved.config["model"], str(resolved.config["trainer"]["accelerator"]))
    inputs = loaded.inputs([question], [[picture]])
    decoding, seed = resolved.config["decoding"], int(resolved.config["seed"])
    arguments = {**generate_arguments(decoding), "max_new_tokens": int(decoding["max_new_tokens"]), "seed": seed}
    answers: list[Answer] = []
    for stack in (Stack([]), Stack({**resolved.methods, WATCH: AttentionWatch()})):
        with stack.attach(loaded.model, loaded.processor) as handle:
            torch.manual_seed(seed)
            answers.append(_answer(handle, loaded, inputs, {**arguments, "sample_ids": ["trace"]}))
            telemetry = handle.telemetry()[0]
    layout = handle.bus.last_request.layout if handle.bus and handle.bus.last_request else None
    spans = layout.images[0] if layout is not None else ()
    rasters, patches = _rasters(spans, inputs, picture, loaded)
    config = resolved.config["model"]
    about = {
        "picture": name,
        "question": question,
        "model": f"{config['name']} ({config['path']})",
        "stack": resolved.stack_name,
        "methods": " → ".join(resolved.methods) or "none",
        "decoding": ", ".join(f"{key}={value}" for key, value in arguments.items()),
    }
    notes = [*notes_of([resolved]), *([] if rasters else ["No raster of patches is known: nothing is drawn."])]
    length = inputs["input_ids"].shape[1]
    known = Known(lambda token: str(loaded.processor.decode([token])), length, patches, answers[1].texts)
    telemetry = {key: value for key, value in telemetry.items() if key not in (WATCH, "bus")}
    return Traced(about, answers[0], answers[1], records_of(handle), known, rasters, telemetry, notes)


def records_of(handle: Handle) -> list[dict[str, Any]]:
    """Return the traces of the only sample as plain records: values lose their batch axis."""
    return [
        {
            "method": item.method,
            "phase": item.phase,
            "step": item.step,
            "layer": item.layer,
            "values": {
                key: value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
                for key, value in item.values.items()
            },
        }
        for item in handle.trace()
    ]


def _answer(handle: Handle, loaded: LoadedModel, inputs: Any, arguments: dict[str, Any]) -> Answer:
    from mitigate.diagnostics.labels import offsets
    from mitigate.report.trace import Answer

    plain = handle.bus is None
    own = {key: value for key, value in arguments.items() if not (plain and key in ("seed", "sample_ids"))}
    output = handle.generate(**inputs, **own) if plain else handle.generate(**inputs, **own, trace=True)
    sequences = output if hasattr(output, "shape") else output.sequences
    tokens = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    text, places = offsets(tokens, loaded.processor)
    return Answer(text, tokens, [text[start:stop] for start, stop in places])


def _rasters(
    spans: Sequence[Any], inputs: Any, picture: Image, loaded: LoadedModel
) -> tuple[list[Raster], dict[int, str]]:
    """Return the pictures' rasters (of a picture in tiles only its thumbnail) and the names of patch columns."""
    from mitigate.report.overlays import seen_picture
    from mitigate.report.trace import Raster

    rasters, patches = [], {}
    for span in spans:
        if span.grid is None:
            continue
        columns = span.positions.tolist()
        tile = "" if span.tile is None else f" of tile {span.tile[0]},{span.tile[1]}"
        for place, column in enumerate(columns):
            patches[column] = f"{place // span.grid[1]},{place % span.grid[1]}{tile}"
        if span.tile is not None and not span.thumbnail:
            continue
        pixels = inputs.get("pixel_values")
        usable = pixels is not None and pixels.dim() == 4 and len(pixels) > span.image
        seen = seen_picture(pixels[span.image], loaded.processor) if usable else None
        rasters.append(Raster(columns, tuple(span.grid), picture if seen is None else seen, seen is not None))
    return rasters, patches


# ---------------------------------------------------------------------------------------------------------- printing


def show(traced: Traced, console: Console, *, every: bool = False) -> None:
    """Print answers with their differences, and a table per method."""
    from mitigate.report.trace import differences, spans

    marks = differences(traced.plain, traced.stacked)
    for title, answer, own in (
        ("Without the stack", traced.plain, marks[0]),
        (f"With {traced.about['stack']}", traced.stacked, marks[1]),
    ):
        line = Text(f"{title}: ", style="bold")
        for text, mark in spans(answer, own):
            lead = text[: len(text) - len(text.lstrip())]
            line.append(
                f"{lead}[{text.lstrip()}]" if mark and text.strip() else text, style="red" if mark else "not bold"
            )
        console.print(line, soft_wrap=True)
    same = traced.plain.tokens == traced.stacked.tokens
    _say(console, "The answers are the same.\n" if same else "In brackets: tokens without a counterpart.\n")
    sections = traced.sections(every=every)
    for section in sections:
        table = Table(title=section.method, title_justify="left", title_style="bold")
        for column in section.columns:
            table.add_column(column, overflow="fold")
        for row in section.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    if not sections:
        _say(console, "No method reported anything; choose some with methods=[NAME] (`mitigate list methods`).\n")
    for method, counters in traced.telemetry.items():
        counted = ", ".join(f"{key} {value:.4g}" for key, value in counters.items() if value)
        if counted:
            _say(console, f"{method} counted: {counted}\n")
    for note in traced.notes:
        _say(console, f"! {note}\n")


def _say(console: Console, text: str) -> None:
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
