"""What the bus must know about a model family: its parts, its geometry, and the roles of its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mitigate.adapters.placing import input_device
from mitigate.adapters.spans import Batch, check_pictures, derive_layout
from mitigate.core.facts import ModelFacts
from mitigate.core.layout import ImageSpan, TokenLayout
from mitigate.errors import ConfigError, LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PretrainedConfig, PreTrainedModel, ProcessorMixin

    from mitigate.core.request import Request


class Adapter(ABC):
    """One model family. Subclasses bring the rule for image spans; the rest is transformers' common interface."""

    family: str
    """transformers' ``model_type``, and the name under which the adapter is registered."""
    spatial_grid: bool = True
    """Whether image tokens form a raster."""
    causal_prompt: bool = True
    """Whether prompt tokens see only what precedes them."""
    needs_processor: bool = False
    """Whether the layout needs tokens that only the tokenizer knows; without the processor a stack is refused."""
    nested_images: bool = False
    """Whether the processor takes one list of pictures per prompt, or all pictures of the batch in one."""
    layout_only: frozenset[str] = frozenset()
    """Inputs that nothing but the layout needs; under a stack ``generate`` goes on without them."""
    processor_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments the processor is called with, besides those that all take."""
    text_only: bool = True
    """Whether a prompt may come without a picture."""
    api: ClassVar[int] = 1
    """Version of this interface a plugin is written for; a newer one than the framework's is refused."""
    tiny: ClassVar[str | None] = None
    """``module:function`` that builds a tiny random model and its processor, for the conformance checks of methods."""

    # ------------------------------------------------------------------------------------------------------ the model

    def entry(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the module that ``generate`` calls once per step: the whole model, unless generation is delegated."""
        return model

    def decoder_layers(self, model: PreTrainedModel) -> Sequence[Any]:
        """Return the blocks of the text decoder, first to last."""
        return cast("Sequence[Any]", self.entry(model).get_decoder().layers)

    def decoder_config(self, model: PreTrainedModel) -> PretrainedConfig:
        """Return the configuration object the decoder's attention modules share."""
        return cast("PretrainedConfig", model.config.get_text_config(decoder=True))

    def attention(self, layer: Any) -> nn.Module:
        """Return the self-attention of a block."""
        return cast(nn.Module, layer.self_attn)

    def final_norm(self, model: PreTrainedModel) -> nn.Module:
        """Return the norm between the last block and the unembedding: a scale without shift (RMSNorm)."""
        return cast(nn.Module, self.entry(model).get_decoder().norm)

    def unembedding(self, model: PreTrainedModel) -> nn.Module:
        """Return the linear map from the normed residual stream to the logits."""
        return cast(nn.Module, self.entry(model).get_output_embeddings())

    def logits(self, model: PreTrainedModel, logits: Tensor) -> Tensor:
        """Return what the model makes of its unembedding's output ``[..., V]``: a soft cap, where it has one.

        Every logit depends on its own raw value alone.
        """
        cap = getattr(self.decoder_config(model), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def output_projection(self, layer: Any) -> nn.Module:
        """Return the linear map from the concatenated heads of a block to the residual stream."""
        return cast(nn.Module, self.attention(layer).o_proj)

    def output_norm(self, layer: Any) -> nn.Module | None:
        """Return the norm a block applies to what its attention adds (RMSNorm); most blocks have none."""
        if hasattr(layer, "post_feedforward_layernorm"):  # then the norm named after attention follows it
            return cast(nn.Module, layer.post_attention_layernorm)
        return getattr(layer, "post_self_attn_layernorm", None)

    def mlp(self, layer: Any) -> nn.Module:
        """Return the MLP of a block; its input and output are ``[B, Q, D]``."""
        return cast(nn.Module, layer.mlp)

    def vision_layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the blocks of the vision tower, first to last.

        Raises
        ------
        UnsupportedModel
            If the family has none, or its adapter does not know them.
        """
        raise UnsupportedModel(f"{self.family}: the blocks of the vision tower are not known")

    def projector(self, model: PreTrainedModel) -> nn.Module:
        """Return the module whose output is the projected image features; see `features`.

        Raises
        ------
        UnsupportedModel
            If the family has none, or its adapter does not know it.
        """
        raise UnsupportedModel(f"{self.family}: the module that projects image features is not known")

    def features(self, output: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Divide the projector's output into the features of every picture, each ``[N, D]``."""
        return list(output)

    def joined(self, features: Sequence[Tensor], output: Tensor) -> Tensor:
        """Put features back into the form in which the projector gave them (``output``)."""
        return torch.stack(list(features))

    def facts(self, model: PreTrainedModel) -> ModelFacts:
        """Read the geometry off a loaded model."""
        return self.facts_of_config(model.config)

    def facts_of_config(self, config: Any) -> ModelFacts:
        """Read the geometry off a configuration."""
        text = config.get_text_config(decoder=True)
        return ModelFacts(
            family=config.model_type,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            spatial_grid=self.spatial_grid,
            vision_layers=getattr(getattr(config, "vision_config", None), "num_hidden_layers", None),
            causal_prompt=self.causal_prompt,
            attention_layers=_attention_layers(text),
        )

    # ----------------------------------------------------------------------------------------------------- the layout

    def image_tokens(self, config: Any) -> tuple[int, ...]:
        """Return the ids of the placeholders in whose place the model puts image (and video) features."""
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        return tuple(token for token in ids if token is not None)

    def separators(self, model: PreTrainedModel, processor: ProcessorMixin | None) -> frozenset[int]:
        """Return the ids of tokens that mark an image's begin, end or parts, and are text to the model."""
        return frozenset()

    def picture_facts(
        self, model: PreTrainedModel, inputs: Mapping[str, Any]
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        """Return what the processor said of every picture and of every video of a batch, in order.

        ``None`` where it said nothing, so that their number is not known either.
        """
        pixels = inputs.get("pixel_values")
        return (None if pixels is None else [None] * len(pixels)), None

    @abstractmethod
    def image_spans(self, row: Tensor, batch: Batch) -> list[ImageSpan]:
        """Return the rasters of one row of token ids ``[P]`` from left to right.

        Parameters
        ----------
        batch
            Gives the number of the next picture or video, and what the processor said of it.

        Raises
        ------
        LayoutError
            If the tokens do not fit the model's image geometry.
        """

    def layout(
        self,
        model: PreTrainedModel,
        ids: Tensor,
        mask: Tensor | None,
        inputs: Mapping[str, Any],
        processor: ProcessorMixin | None = None,
    ) -> TokenLayout:
        """Derive the roles of a batch of prompts.

        Parameters
        ----------
        ids
            ``[B, P]`` token ids as the processor made them (image placeholders expanded).
        mask
            ``[B, P]`` attention mask, or ``None`` when nothing is padded.
        inputs
            The other inputs of the forward (image sizes, grids).
        processor
            The model's processor, where it is known.

        Raises
        ------
        LayoutError
            If prompts are padded on the right, the mask has another shape, or the image tokens fit no image.
        ConfigError
            If the family needs the processor and there is none.
        """
        if self.needs_processor and processor is None:
            raise ConfigError(
                f"{self.family}: only the tokenizer knows which tokens frame a picture; attach with the processor:"
                " stack.attach(model, processor)"
            )
        return derive_layout(self, Batch(model, processor, inputs, *self.picture_facts(model, inputs)), ids, mask)

    def completed(self, layout: TokenLayout, ids: Tensor, batch: Batch) -> TokenLayout:
        """Return a derived layout with what this family alone has, or refuse it with a `LayoutError`."""
        return layout

    # ------------------------------------------------------------------------------------------- whole prompts, by hand

    def prompt_inputs(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, pictures: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what a forward over whole prompts needs besides ids, mask and pictures: positions, token types.

        Parameters
        ----------
        ids, mask
            ``[B, P]`` left-padded prompts and their mask.
        pictures
            The inputs that carry their pictures; empty without.
        """
        return {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}

    def whole_prompt(self, inputs: Mapping[str, Any], request: Request) -> dict[str, Any]:
        """Turn the inputs of the first forward into those of a cacheless pass over the whole prompt.

        The first forward may lack the prompt's last token (split prefill); images are not encoded again
        when ``generate`` has encoded them already.

        Raises
        ------
        UnsupportedModel
            If the prompt arrives in chunks: then so do its images.
        """
        layout, ids = request.layout, request.ids
        length = layout.prompt_length
        embeds = inputs.get("inputs_embeds")
        known = (inputs["input_ids"] if embeds is None else embeds).shape[1]
        if known < length - 1:
            raise UnsupportedModel(
                "a diagnostic pass needs the whole prompt at once; leave prefill_chunk_size and past_key_values unset"
            )
        dropped = {"past_key_values", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels"}
        kept = {name: value for name, value in inputs.items() if name not in dropped}
        if embeds is None:
            whole = {"input_ids": ids[:, :length]}
        else:
            rest = self.entry(request.bus.model).get_input_embeddings()(ids[:, known:length])
            whole = {"inputs_embeds": torch.cat([embeds, rest], 1)}
        return {
            **kept,
            **whole,
            **request.bus.last_logits_only,
            "attention_mask": layout.valid[:, :length].long(),
            "position_ids": request.positions(length),
            "use_cache": False,
            "return_dict": True,
        }

    # ----------------------------------------------------------------------------------------------------- the images

    def check_pictures(self, inputs: Mapping[str, Any], layout: TokenLayout, *, encodes: bool) -> None:
        """Refuse image tokens without pictures, and encoded pictures where a method acts before that (``encodes``)."""
        check_pictures(inputs, layout, encodes=encodes)

    def images(self, inputs: Mapping[str, Any], layout: TokenLayout) -> list[Tensor]:
        """Return the pixels of every picture as the processor made them, from the inputs of a request.

        Raises
        ------
        UnsupportedModel
            If the pictures came encoded already, or lie in a cache.
        """
        pixels = inputs.get("pixel_values")
        if pixels is None and any(layout.images):
            raise UnsupportedModel("the images came encoded; give pixel_values, which the stack needs")
        return [] if pixels is None else list(pixels)

    def with_images(self, inputs: Mapping[str, Any], images: Sequence[Tensor], layout: TokenLayout) -> dict[str, Any]:
        """Return the inputs with other pixels in place of every picture's."""
        return {**inputs, "pixel_values": torch.stack(list(images))} if images else dict(inputs)

    def chosen_images(self, inputs: Mapping[str, Any], wanted: Sequence[int], layout: TokenLayout) -> dict[str, Any]:
        """Return the image inputs of a batch whose pictures are the given ones, in this order, repeated or not."""
        images = self.images(inputs, layout)
        return self.with_images({}, [images[index] for index in wanted], layout)

    def image_pixels(self, inputs: Mapping[str, Any], image: int, layout: TokenLayout) -> Tensor:
        """Return one picture's pixels as the processor made them, from the inputs of a request.

        Raises
        ------
        UnsupportedModel
            If the pictures came in another form.
        """
        images = self.images(inputs, layout)
        if image >= len(images):
            raise UnsupportedModel("the request brings no pixel_values to tell its images apart")
        return images[image]

    def without_images(self, model: PreTrainedModel, row: Tensor, processor: ProcessorMixin | None) -> Tensor:
        """Return the token ids ``[n]`` of a prompt without its pictures and the tokens that frame them."""
        dropped = [*self.image_tokens(model.config), *self.separators(model, processor)]
        return row[~torch.isin(row, torch.tensor(dropped, device=row.device))]

    # ----------------------------------------------------------------------------------------------------- the inputs

    def prompt_text(self, processor: ProcessorMixin, prompt: str, pictures: int) -> str:
        """Return the text of a user's turn as the family's processor takes it, pictures first.

        Raises
        ------
        ConfigError
            If the processor has no chat template.
        """
        if getattr(processor, "chat_template", None) is None:
            raise ConfigError(
                f"{self.family}: the processor has no chat template; give one: model.chat_template=FILE.jinja"
            )
        content = [{"type": "image"} for _ in range(pictures)] + [{"type": "text", "text": prompt}]
        message = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(message, add_generation_prompt=True))

    def inputs(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
    ) -> BatchFeature:
        """Make the model inputs of a batch: chat template, left padding, tensors on the model's device.

        Parameters
        ----------
        prompts
            User texts, without template or image placeholders.
        images
            Per prompt its pictures; they come before the text.
        """
        texts = [
            self.prompt_text(processor, prompt, len(pictures)) for prompt, pictures in zip(prompts, images, strict=True)
        ]
        texts = [_begun_once(processor, text) for text in texts]
        flat = [picture for pictures in images for picture in pictures]
        given: Any = [list(pictures) for pictures in images] if self.nested_images else flat
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left", **self.processor_options}
        batch = processor(text=texts, images=given if flat else None, **options)
        return cast("BatchFeature", batch.to(input_device(model), dtype=model.dtype))


def _begun_once(processor: ProcessorMixin, text: str) -> str:
    """Leave out the beginning-of-sequence token that a chat template writes where the tokenizer adds it itself."""
    words = processor.tokenizer
    begin = words.bos_token
    if not begin or not text.startswith(begin) or words("").input_ids[:1] != [words.bos_token_id]:
        return text
    return text.removeprefix(begin)


def _attention_layers(text: Any) -> tuple[int, ...] | None:
    """Return the decoder blocks with attention over all or the latest keys; ``None`` where no kinds are told."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return None
    return tuple(index for index, kind in enumerate(kinds) if kind in ("full_attention", "sliding_attention"))


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of the runs of True in ``[P]``."""
    padded = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    starts, stops = ((padded == step).nonzero().flatten().tolist() for step in (1, -1))
    return list(zip(starts, stops, strict=True))


def equal_spans(row: Tensor, image_token: int, size: int, family: str) -> Iterable[tuple[int, int]]:
    """Cut runs of image tokens into images of ``size`` tokens; adjacent images share a run.

    Raises
    ------
    LayoutError
        If a run is no multiple of the size.
    """
    for start, stop in runs(row == image_token):
        if (stop - start) % size:
            raise LayoutError(
                f"{stop - start} image tokens in a row, but {family} makes {size} of each image;"
                " was the prompt made by this model's processor?"
            )
        for first in range(start, stop, size):
            yield first, first + size
