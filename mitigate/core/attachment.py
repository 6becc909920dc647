"""What lasts as long as a stack stays attached: the processor, what follows from it, and a bounded shared memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from mitigate.core.layout import Role, TokenLayout
from mitigate.core.vocabulary import Vocabulary
from mitigate.errors import ConfigError, MitigateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mitigate.adapters.base import Adapter

#: Entries of the shared memory; what was used least recently is dropped.
CAPACITY = 256
#: Stand in for a user's words and picture when a prompt is taken apart.
_ANY_WORDS, _SIDE = "one two three", 64
#: Processor -> template -> tokens before and after the user's words.
_AFFIXES: WeakKeyDictionary[Any, dict[str, tuple[list[int], list[int]] | None]] = WeakKeyDictionary()


class Attachment:
    """The processor a stack was attached with, and memory across requests.

    Parameters
    ----------
    model
        The whole vision-language model.
    adapter
        The adapter of its family.
    processor
        Its processor, or ``None``.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter, processor: ProcessorMixin | None) -> None:
        self._model, self._adapter, self.processor = model, adapter, processor
        self._memory: OrderedDict[Hashable, Any] = OrderedDict()

    def shared(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """See `Request.shared`."""
        if key not in self._memory:
            self._memory[key] = compute()
        self._memory.move_to_end(key)
        while len(self._memory) > CAPACITY:
            self._memory.popitem(last=False)
        return self._memory[key]

    def vocabulary(self, device: torch.device) -> Vocabulary:
        """See `Request.vocabulary`."""
        tokenizer = self._tokenizer()
        size = len(cast(Tensor, self._adapter.unembedding(self._model).weight))
        vocabulary: Vocabulary = self.shared(
            ("vocabulary", str(device)), lambda: Vocabulary.of(tokenizer, size, device)
        )
        return vocabulary

    def tokens(self, text: str) -> list[int]:
        """See `Request.tokenize`."""
        found: list[int] = self._tokenizer()(text, add_special_tokens=False)["input_ids"]
        return found

    def _tokenizer(self) -> Any:
        if self.processor is None:
            raise ConfigError("a method needs to know words; attach with the processor: stack.attach(model, processor)")
        return getattr(self.processor, "tokenizer", self.processor)

    def question(self, ids: Tensor, layout: TokenLayout) -> Tensor | None:
        """Find the user's own words in prompts made with the processor's chat template.

        Parameters
        ----------
        ids
            ``[B, P]`` prompts with one turn of the user, pictures first.
        layout
            Their layout.

        Returns
        -------
        Tensor or None
            ``[B, P]`` bool; ``None`` if the processor or its template is not known, or a prompt with a picture does not
            follow the template.
        """
        affixes = self._known_affixes()
        if affixes is None:
            return None
        head, tail = (torch.tensor(part, device=ids.device, dtype=ids.dtype) for part in affixes)
        columns = torch.arange(ids.shape[1], device=ids.device)
        inside = torch.zeros_like(layout.prompt_roles, dtype=torch.bool)
        for row, start in enumerate(layout.after_image.tolist()):
            if not layout.images[row]:
                continue
            first, last = start + len(head), ids.shape[1] - len(tail)
            if first > last or not torch.equal(ids[row, start:first], head) or not torch.equal(ids[row, last:], tail):
                return None
            inside[row] = (columns >= first) & (columns < last) & (layout.prompt_roles[row] == Role.PROMPT)
        return inside

    def _known_affixes(self) -> tuple[list[int], list[int]] | None:
        """Return `_affixes`, found once per processor and template: it takes two calls of the processor."""
        if self.processor is None:
            return None
        known = _AFFIXES.setdefault(self.processor, {})
        template = getattr(self.processor, "chat_template", None)
        key = template if isinstance(template, str) else str(template)
        if key not in known:
            known[key] = self._affixes()
        return known[key]

    def _affixes(self) -> tuple[list[int], list[int]] | None:
        """Tokens the processor puts between a picture and the user's words, and after them."""
        try:
            bare, full = (self._after_picture(words) for words in ("", _ANY_WORDS))
        except MitigateError:  # the family has no way of asking about one picture in one turn
            return None
        if bare is None or full is None:
            return None
        tail = _common(bare[::-1], full[::-1])
        head = min(_common(bare, full), len(bare) - tail)
        return full[:head], full[len(full) - tail :]

    def _after_picture(self, words: str) -> list[int] | None:
        """Return the tokens that follow a picture and what frames it, in a prompt as the adapter makes it."""
        picture = Image.new("RGB", (_SIDE, _SIDE))
        inputs = self._adapter.inputs(self._model, cast(Any, self.processor), [words], [[picture]])
        tokens = inputs["input_ids"][0].tolist()
        images = self._adapter.image_tokens(self._model.config)
        places = [place for place, token in enumerate(tokens) if token in images]
        if not places:
            return None
        marks = self._adapter.separators(self._model, self.processor)
        return list(dropwhile(lambda token: token in marks, tokens[places[-1] + 1 :]))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
