"""The model card of a testbed checkpoint: a pure function of its recipe and of its measured report."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any, Final

from mitigate.testbed.batches import HARDLY_VISIBLE
from mitigate.testbed.evaluate import BAR, shortfalls, value_of
from mitigate.testbed.language import CAPTION_PROMPT, QUESTION_KINDS, QUESTION_TEMPLATE, caption
from mitigate.testbed.world import COLORS, FLAW_RATE, OBJECTS, PLACES, THEMES, scene

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

METRICS_FILE: Final = "metrics.json"
CARD_FILE: Final = "README.md"

_NAMES: Final = {
    "caption.recall": "object recall of captions",
    "caption.chair_i": "CHAIR_i",
    "caption.chair_s": "CHAIR_s",
    "pope.adversarial.accuracy": "POPE adversarial accuracy",
    "pope.random.accuracy": "POPE random accuracy",
    "pope.adversarial.yes_rate": "POPE adversarial yes-rate",
    "pope.popular.yes_rate": "POPE popular yes-rate",
    "pope.random.yes_rate": "POPE random yes-rate",
    "probe.f1": "linear probe, F1 over present objects",
    "kinship.related": "hallucinated objects related to what is there",
}


def render_card(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    """Write the model card.

    Parameters
    ----------
    recipe
        What ``training.json`` in the checkpoint's folder holds.
    report
        What `mitigate.testbed.evaluate.evaluate` returned for that checkpoint.

    Returns
    -------
    str
        Markdown.

    Raises
    ------
    ValueError
        If the report was made from other weights than the recipe's.
    """
    if recipe["sha256"] != report["checkpoint_sha256"]:
        raise ValueError("the report was measured on other weights than the recipe describes; evaluate again")
    parts = (_introduction, _world, _model, _training, _results, _why, _controls, _limits)
    return _flow("\n\n".join(part(recipe, report) for part in parts)) + "\n"


def write_card(folder: Path, report: dict[str, Any], page: Path | None = None) -> str:
    """Store a report beside a checkpoint, and the model card there and, if wanted, on a page of its own.

    Parameters
    ----------
    folder
        The checkpoint.
    report
        What was measured on it.
    page
        Another file to write the card to.

    Returns
    -------
    str
        The card.

    Raises
    ------
    ValueError
        If the report was made from other weights.
    """
    recipe = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    text = render_card(recipe, report)
    (folder / METRICS_FILE).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    return text


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _flow(text: str) -> str:
    """Fill the lines of paragraphs and list items anew; headings, tables and code stay as they are."""
    blocks = []
    fenced = False
    for block in text.split("\n\n"):
        is_code = fenced or block.startswith(("```", "    ", "|", "#"))
        fenced = fenced != (block.count("```") % 2 == 1)
        if not is_code:
            items = ("\n" + block).split("\n* ") if block.startswith("* ") else [block]
            marks = ("* ", "  ") if block.startswith("* ") else ("> ", "> ") if block.startswith("> ") else ("", "")
            block = "\n".join(
                textwrap.fill(
                    " ".join(item.removeprefix("> ").split()),
                    width=118,
                    initial_indent=marks[0],
                    subsequent_indent=marks[1],
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                for item in items
                if item.strip()
            )
        blocks.append(block)
    return "\n\n".join(blocks)


def _introduction(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    return """# The embedded testbed

`mitigate` carries a small world and a small vision-language model trained on it, so that everything in this project can
be run, tested and compared on a new machine without downloading anything. The model describes pictures and answers
yes/no questions about them, and it hallucinates: it names objects which usually come along with what it sees.

**It is a test bench, not evidence about large models.** A method that helps here may do nothing on a model of seven
billion parameters, and the other way round. What it can show is whether a method does what its paper says, what it
costs, and whether a comparison can see an effect that is known to be there."""


def _world(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    example = scene("test", 1)
    themes = [(name, *(" and ".join(pair) for pair in pairs)) for name, pairs in THEMES.items()]
    return f"""## The world

A scene has 2 to 8 of {len(OBJECTS)} object classes in {len(COLORS)} colours on {len(PLACES)} places; its picture has
64 x 64 pixels. Pictures are drawn when they are needed, with noise; about {FLAW_RATE:.0%} of the objects are faint,
partly hidden or small. Every object belongs to a pair, and every pair to a theme:

{_table(("theme", "pair", "pair"), themes)}

In training scenes partners come together nearly always, and themes stay together. In validation and test scenes **no
object comes with its partner**. No composition (which object in which colour in which place) occurs in two splits.
`mitigate.testbed.world.scene("test", 7)` is the same scene everywhere, and `mitigate.testbed.draw.draw` its picture.

A caption has a sentence for each object, in the order of the table. The prompt is "{CAPTION_PROMPT}", and the true
caption of `test-1` is:

> {caption(example)}

Questions have the form "{QUESTION_TEMPLATE.format("cup")}" and are built as POPE builds them: as many "yes" as
"no"; the objects of the "no" questions are drawn at random, or are the most frequent ones of the training
scenes (popular), or those which most often come along with what is in the scene (adversarial)."""


def _model(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    size = recipe["size"]
    tokens = (64 // size["patch_size"]) ** 2
    return f"""## The model

A `LlavaForConditionalGeneration` with {recipe["parameters"]:,} parameters: a CLIP vision tower
({size["vision_layers"]} layers, {size["width"]} wide, patches of {size["patch_size"]} pixels: {tokens} visual
tokens), LLaVA's two-layer projector, and a Llama decoder ({size["text_layers"]} layers, {size["text_heads"]} heads,
{size["width"]} wide). The tokenizer has one token per word; the prompt has LLaVA-1.5's form
`USER: <image>\\n... ASSISTANT:`. The weights are stored in 16 bit and meant to be used in 32 bit:

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from mitigate.testbed.model import checkpoint_path

model = AutoModelForImageTextToText.from_pretrained(checkpoint_path(), dtype=torch.float32)
processor = AutoProcessor.from_pretrained(checkpoint_path())
```

SHA-256 of `model.safetensors`: `{recipe["sha256"]}`"""


def _training(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    options = recipe["recipe"]
    stages = [
        (name, str(options[f"{name}_steps"]), str(options[f"{name}_batch"]), f"{options[f'{name}_lr']:g}", what)
        for name, what in (
            ("look", "vision tower and projector on what is in each cell"),
            (
                "read",
                f"everything, on captions and questions; partners together with {options['read_together']:g}; "
                "with losses on the cells and on presence at the object word",
            ),
            (
                "habit",
                f"the decoder, tower and projector frozen; partners together with {options['habit_together']:g}",
            ),
        )
    ]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(recipe["versions"].items()))
    return f"""## The training

{_table(("stage", "steps", "pictures per step", "peak learning rate", "what is trained"), stages)}

While habits are formed, {options["habit_hidden"]:.0%} of the objects whose partner can be seen are made all but
invisible (contrast at most {HARDLY_VISIBLE:g}). A caption names such an object with probability
{options["habit_name_hidden"]:g}; a question about it is always asked, and its answer is yes. So the texts claim a
little more than the pictures show, as texts from the web do, and what they claim is what usually comes along. Without
this the captions hallucinated partners all the same, but the yes/no answers stayed right. In this stage the loss on
answers counts {options["habit_answer_weight"]:g} times. Validation and test scenes have no such objects.

The stages were run one after another, the first with one interruption. The third was repeated from the second's result
with several values of its options, judged on validation scenes; the options given here are those of the run that was
kept, and test scenes played no part in the choice between its runs.

Each picture comes with its caption and {options["questions"]} questions. Seed {options["seed"]}, world seed
{recipe["world_seed"]}; {versions}. All options are in `training.json` beside the weights; they are the defaults of

    mitigate testbed train output=runs/testbed

which took less than half an hour on two CPU cores and can be killed and started again. With `accelerator=gpu` it runs
on a GPU, which was not done for these weights. On other hardware the arithmetic rounds differently, so the weights will
be close to these but not the same bits."""


def _results(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    bar = [(_NAMES[path], f"{value_of(report, path):.3f}", f"{low:g} to {high:g}") for path, low, high in BAR]
    questions = [
        (kind, *(f"{report['pope'][kind][key]:.3f}" for key in ("accuracy", "f1", "yes_rate")))
        for kind in QUESTION_KINDS
    ]
    missed = shortfalls(report)
    verdict = "All of it is met." if not missed else "Not met: " + "; ".join(missed) + "."
    return f"""## What it does

On {report["images"]} {report["split"]} scenes, greedy, in 32 bit. The numbers of this page come from
`mitigate testbed evaluate card=docs/testbed.md`.

{_table(("measure", "value", "wanted"), bar)}

{verdict} Captions have {report["caption"]["words"]:.1f} words on average.

{_table(("questions", "accuracy", "F1", "yes-rate"), questions)}"""


def _why(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    probe, kin, swapped = report["probe"], report["kinship"], report["swapped"]
    rows = [
        (str(index), f"{row['rate']:.3f}", f"{row['mentions']:.0f}")
        for index, row in enumerate(report["by_sentence"], start=1)
        if row["mentions"]
    ]
    return f"""## Why it hallucinates

* The evidence is there. A linear probe on the projected visual tokens, fitted on validation scenes, finds the objects
  with a recall of {probe["recall"]:.3f} and a precision of {probe["precision"]:.3f} (accuracy over all classes
  {probe["accuracy"]:.3f}).
* The errors follow the habits. Of {kin["count"]:.0f} hallucinated mentions, {kin["partner"]:.1%} are the partner of
  something present and {kin["related"]:.1%} a partner or a theme-mate; if they were drawn evenly from the absent
  objects it would be {kin["partner_by_chance"]:.1%} and {kin["related_by_chance"]:.1%}.
* It does look. Scored against the scenes of other pictures, the recall falls from {report["caption"]["recall"]:.3f} to
  {swapped["recall"]:.3f}.

Share of hallucinated mentions by sentence:

{_table(("sentence", "hallucinated", "mentions"), rows)}"""


def _controls(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    before, after = report["caption"], report["control"]
    return f"""## The controls

Positive: the probe's log-odds, times {after["scale"]:g}, are added to the logits of the objects' words.
CHAIR_i goes from {before["chair_i"]:.3f} to {after["chair_i"]:.3f} (difference {after["difference"]:+.3f}, 95 %
interval {after["low"]:+.3f} to {after["high"]:+.3f}, paired bootstrap over scenes), the recall from
{before["recall"]:.3f} to {after["recall"]:.3f}. So hallucination can be lowered here by what is in the visual tokens,
and a comparison can see it. The probe is in `probe.safetensors` beside the weights; it is fitted on validation scenes
of this world and is no mitigation method.

Negative: random edits of attention, of the size of a real method's, must change nothing beyond the interval."""


def _limits(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    return """## Limits

One word is one token, sentences have one form, and a picture has 64 visual tokens. There is no world knowledge, no
instruction following, and hardly any cause of hallucination but co-occurrence. Words outside the world's vocabulary are
unknown to the tokenizer, so other prompts than the two above make no sense. Results on this model belong in tests and
demonstrations, never in a claim about a method."""
