"""Any further family of transformers, as far as its processor shows how it writes pictures; in doubt it is refused."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from mitigate.adapters.base import Adapter
from mitigate.adapters.writing import Writing, learn
from mitigate.core.layout import ImageSpan, Role
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

    from mitigate.adapters.spans import Batch
    from mitigate.core.facts import ModelFacts
    from mitigate.core.layout import TokenLayout
    from mitigate.core.request import Request

#: What to do about a model that this adapter refuses.
REMEDY = (
    "write an adapter: in mitigate/adapters, or in a package of your own (entry-point group mitigate.models);"
    " docs/contribute/add-a-model.md"
)

#: Names under which configurations keep the tokens that a chat template writes around a picture.
FRAMES = tuple(f"{what}_{end}_token_id" for what in ("image", "vision") for end in ("start", "end"))


class GenericAdapter(Adapter):
    """A family without an adapter of its own.

    The decoder is reached through transformers' common interface, and checked. How pictures are written comes from the
    processor, which is asked to write a few; every prompt is then compared with that, token by token.

    Parameters
    ----------
    model
        The whole vision-language model.
    processor
        Its processor. Without it neither `facts` nor a layout can be had.

    Raises
    ------
    UnsupportedModel
        Naming what is missing.
    """

    needs_processor = True

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin | None = None) -> None:
        self.family = str(model.config.model_type)
        problem = _decoder_problem(self, model)
        if problem is not None:
            raise UnsupportedModel(f"no adapter for model type {self.family!r}, and {problem}\n{REMEDY}")
        self._model = model
        self._learned: tuple[ProcessorMixin, Writing] | None = None
        self._processor = processor
        self._plain = _plain_positions(model)
        self.causal_prompt = not _bidirectional(model)

    def writing(self, processor: ProcessorMixin | None) -> Writing:
        """Return how a processor writes pictures, which is asked once.

        Raises
        ------
        ConfigError
            If there is no processor.
        UnsupportedModel
            If what it writes follows no rule that a prompt can be read by.
        """
        processor = self._processor = processor or self._processor
        if processor is None:
            raise ConfigError(
                f"{self.family} has no adapter of its own: how it writes pictures is asked of its processor; attach"
                " with it: stack.attach(model, processor)"
            )
        if self._learned is None or self._learned[0] is not processor:
            self._learned = (processor, learn(self._model.config, processor, REMEDY))
        return self._learned[1]

    # ------------------------------------------------------------------------------------------------------ the model

    def facts_of_config(self, config: Any) -> ModelFacts:
        """Read the geometry off a configuration, and from the processor whether pictures are rasters."""
        self.spatial_grid = self.writing(None).raster
        return super().facts_of_config(config)

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """Return the decoder's last norm.

        Raises
        ------
        UnsupportedModel
            If it is no RMSNorm.
        """
        norm = getattr(model.get_decoder(), "norm", None)
        if not type(norm).__name__.endswith("RMSNorm"):
            raise self._unknown("the norm before the unembedding")
        return cast(nn.Module, norm)

    def logits(self, model: PreTrainedModel, logits: Tensor) -> Tensor:
        """Return the unembedding's output as it is.

        Raises
        ------
        UnsupportedModel
            If the model may do something with it first: scale it, cap it.
        """
        if not _plain_logits(model):
            raise self._unknown("what is done with the unembedding's output")
        return logits

    def output_projection(self, layer: Any) -> nn.Module:
        """Return ``o_proj``; raises `UnsupportedModel` if there is none."""
        module = getattr(self.attention(layer), "o_proj", None)
        if module is None:
            raise self._unknown("the output projection of the attention")
        return cast(nn.Module, module)

    def output_norm(self, layer: Any) -> nn.Module | None:
        """Return the norm on what attention adds, if there is one.

        Raises
        ------
        UnsupportedModel
            If a block does something else with its attention's output before adding it: gates it, scales it.
        """
        norm = super().output_norm(layer)
        if not _plain_addition(layer, self.attention(layer), norm):
            raise self._unknown("what its blocks do with the output of attention before they add it")
        return norm

    def mlp(self, layer: Any) -> nn.Module:
        """Return ``mlp``; raises `UnsupportedModel` if there is none, or one with experts."""
        module = getattr(layer, "mlp", None)
        if module is None or "down_proj" not in dict(module.named_children()):
            raise self._unknown("a plain MLP in its blocks")
        return cast(nn.Module, module)

    def _unknown(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.family} has no adapter of its own, and {what} is not known\n{REMEDY}")

    # ----------------------------------------------------------------------------------------------------- the layout

    def separators(self, model: PreTrainedModel, processor: ProcessorMixin | None) -> frozenset[int]:
        """Return the added tokens that stand for a picture besides placeholders, and those the configuration names."""
        named = (getattr(model.config, name, None) for name in FRAMES)
        return self.writing(processor).marks.union(token for token in named if isinstance(token, int))

    def picture_facts(
        self, model: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        """Return one entry per picture: its grid or size, where the processor tells it."""
        told = inputs.get(self.writing(None).told_by)
        if told is None or self.writing(None).kind == "tiles":
            return None, None
        return ([None] * len(told) if self.writing(None).kind == "fixed" else told.tolist()), None

    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Find the pictures in a row.

        Raises
        ------
        LayoutError
            If a token is not where the processor would write it, or if there is a video.
        """
        config = batch.model.config
        video = getattr(config, "video_token_id", None)
        if video not in (None, config.image_token_id) and bool((row == video).any()):
            raise LayoutError(f"{self.family} has no adapter of its own, and videos need one")
        spans = self.writing(batch.processor).read(row.tolist(), batch)
        covered = torch.zeros_like(row, dtype=torch.bool)
        for span in spans:
            covered[span.positions] = True
        if not torch.equal(covered, row == config.image_token_id):
            raise LayoutError(f"{self.family}: a prompt holds image tokens that its processor would not write")
        return spans

    def layout(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        mask: Tensor | None,
        inputs: Mapping[str, Any],
        processor: ProcessorMixin | None = None,
    ) -> TokenLayout:
        """Derive the roles of a batch of prompts; see `Adapter.layout`."""
        writing = self.writing(processor)
        layout = super().layout(model, ids, mask, inputs, processor or self._processor)
        for row, roles, spans in zip(ids.tolist(), layout.prompt_roles, layout.images, strict=True):
            for span in {span.image: span for span in reversed(spans)}.values():  # the first of each picture
                # before its first placeholder there may be plain words: the number of a tile
                first = int(span.positions[0])
                roles[writing.start(row, first) : first] = int(Role.SEPARATOR)
        pixels = inputs.get("pixel_values")
        tiles = sum(map(len, layout.images))
        if writing.kind == "tiles" and pixels is not None and len(pixels) != tiles:
            raise LayoutError(
                f"the inputs bring {len(pixels)} tiles, but the prompts hold the tokens of {tiles};"
                " make ids and pixels in one call of the processor"
            )
        return layout

    # ------------------------------------------------------------------------------------------- whole prompts, by hand

    def prompt_inputs(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, pictures: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return positions in one line.

        Raises
        ------
        UnsupportedModel
            If the model's positions or its attention depend on where its pictures are.
        """
        self._check_plain()
        return super().prompt_inputs(model, ids, mask, pictures)

    def whole_prompt(self, inputs: Mapping[str, Any], request: Request) -> dict[str, Any]:
        """Return the inputs of a pass over the whole prompt; raises `UnsupportedModel` as `prompt_inputs`."""
        self._check_plain()
        return super().whole_prompt(inputs, request)

    def _check_plain(self) -> None:
        if not (self._plain and self.causal_prompt):
            what = "positions" if not self._plain else "attention"
            raise UnsupportedModel(
                f"{self.family} has no adapter of its own, and its {what} in a prompt depend on the pictures: methods"
                f" with passes or branches of their own cannot run, nor forwards by hand\n{REMEDY}"
            )

    # ----------------------------------------------------------------------------------------------------- the images

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return every picture's pixels."""
        writing, pixels = self.writing(None), inputs.get("pixel_values")
        if pixels is None or writing.kind in ("fixed", "rows"):
            return super().images(inputs, layout)
        self._check_alone()
        return list(pixels.split(inputs[writing.told_by].prod(-1).tolist()))

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor], layout: TokenLayout) -> dict[str, Any]:
        """Return the inputs with other pixels in place of every picture's."""
        self._check_alone()
        if self.writing(None).kind == "grids" and images:
            return {**inputs, "pixel_values": torch.cat(list(images))}
        return super().with_images(inputs, images, layout)

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int], layout: TokenLayout) -> dict[str, Any]:
        """Return the image inputs of the given pictures."""
        chosen = super().chosen_images(inputs, wanted, layout)
        others = self.writing(None).per_picture - {"pixel_values"}
        return {**chosen, **{name: inputs[name][list(wanted)] for name in sorted(others) if name in inputs}}

    def _check_alone(self) -> None:
        """Refuse inputs that cannot be divided into pictures."""
        writing = self.writing(None)
        if writing.kind == "tiles" or writing.undivided:
            name = min(writing.undivided, default="pixel_values")
            raise self._unknown(f"which part of {name} belongs to which picture")

    # ----------------------------------------------------------------------------------------------------- the inputs

    def inputs(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
    ) -> BatchFeature:
        """Make the model inputs of a batch; see `Adapter.inputs`."""
        self.nested_images = self.writing(processor).nested
        return super().inputs(model, processor, prompts, images)


def _decoder_problem(adapter: GenericAdapter, model: PreTrainedModel) -> str | None:
    """Return why a model cannot be served whatever its processor does, as the end of a sentence; else ``None``."""
    config = model.config
    if not isinstance(getattr(config, "image_token_id", None), int):
        return "its configuration names no image_token_id: where its pictures stand in a prompt cannot be seen"
    if type(model).generate is not GenerationMixin.generate:
        return f"{type(model).__name__} has a generate of its own"
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config(decoder=True).is_encoder_decoder:
        return "it has an encoder and a decoder: its pictures are not among the decoder's tokens"
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not layers:
        return "its decoder has no layers under that name"
    if not type(decoder)._can_set_attn_implementation():
        return "its decoder does not use transformers' AttentionInterface"
    text = adapter.decoder_config(model)
    try:
        served = Adapter.facts_of_config(adapter, config).attention_layers
    except (AttributeError, RuntimeError):  # the latter where layers have configurations of their own
        return "its configuration does not tell one number of layers and heads for the whole decoder"
    for index, layer in enumerate(layers):
        own = getattr(layer, "self_attn", None)
        if any("cross" in name for name, _ in layer.named_children()):
            return f"layer {index} attends to the pictures apart from the text (cross-attention)"
        if served is not None and index not in served:
            continue
        if getattr(own, "config", None) is not text:
            return f"layer {index} has no self_attn that shares the decoder's configuration"
        if _asks_for_its_kernel(type(own)):
            return f"layer {index} attends in another way with kernels that it does not know by name"
    shared = getattr(text, "num_kv_shared_layers", 0)
    if shared:  # they have no cache, and of a prompt they may be given the last token alone
        return f"its last {shared} layers take the keys of earlier ones"
    if served == ():
        return "no layer of its decoder has an attention that is known (full or sliding)"
    return None


def _asks_for_its_kernel(kind: type) -> bool:
    """Whether code does something else for some attention implementations, of which the bus's is none."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return False
    compared = (ast.unparse(node) for node in ast.walk(body) if isinstance(node, ast.Compare))
    return any("_attn_implementation" in comparison for comparison in compared)


def _plain_positions(model: PreTrainedModel) -> bool:
    """Whether positions count the tokens of a prompt; not if a picture's count in rows and columns."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    sections = any("section" in name for part in (rope, *nested) for name in part)
    return not sections and not any(hasattr(module, "get_rope_index") for module in model.modules())


def _bidirectional(model: PreTrainedModel) -> bool:
    """Whether tokens of a prompt may see later ones (taken for so where the forward wants the tokens' types)."""
    text = model.config.get_text_config(decoder=True)
    names = set(inspect.signature(type(model).forward).parameters)
    if "token_type_ids" in names or ("mm_token_type_ids" in names and _plain_positions(model)):
        return True
    causal = (getattr(getattr(layer, "self_attn", None), "is_causal", True) for layer in model.get_decoder().layers)
    return bool(getattr(text, "use_bidirectional_attention", False)) or not all(causal)


def _plain_logits(model: PreTrainedModel) -> bool:
    """Whether the forward returns the unembedding's output as it is: it is named once, and by nothing else."""
    made = [value for name, value in _assigned(type(model)) if name == "logits"]
    return len(made) == 1 and made[0].startswith("self.lm_head(")


def _plain_addition(layer: nn.Module, attention: nn.Module, norm: nn.Module | None) -> bool:
    """Whether what attention returns is projected and added, at most through the norm, and nothing else is done."""
    made = [value for name, value in _assigned(type(attention)) if name == "attn_output"]
    if not made or not made[0].startswith("attention_interface(") or made[-1] != "self.o_proj(attn_output)":
        return False
    if not all(value.startswith("attn_output.reshape(") for value in made[1:-1]):
        return False
    values = [value for _, value in _assigned(type(layer))]
    place = next((place for place, value in enumerate(values) if value.startswith("self.self_attn(")), len(values))
    through = [f"self.{name}(hidden_states)" for name, module in layer.named_children() if module is norm]
    *first, added = values[place + 1 :][: len(through) + 1] or [""]
    sums, last = ("residual + hidden_states", "hidden_states + residual"), (values or [""])[-1]
    return first == through and added in sums and last in sums


def _assigned(kind: type) -> list[tuple[str, str]]:
    """Return ``(name, value)`` of every assignment in a class's forward, in the order they are written."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cast(Any, kind).forward)))
    except (OSError, TypeError, SyntaxError):
        return []
    found = []
    for node in ast.walk(body):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            first = [target.elts[0] if isinstance(target, ast.Tuple) else target for target in targets]
            names = [target.id for target in first if isinstance(target, ast.Name)]
            mark = "" if isinstance(node, ast.Assign) else "+= "  # no plain value, whatever the operator
            found += [(node.lineno, name, mark + ast.unparse(node.value)) for name in names]
    return [(name, value) for _, name, value in sorted(found)]
