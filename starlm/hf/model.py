"""StarLM as transformers models.

The modules have the names that they have in `StarLM`, so one model.safetensors serves both.
"""

from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from starlm.errors import InputError
from starlm.hf.cache import StarLMCache
from starlm.hf.config import StarLMHFConfig
from starlm.hf.inputs import first_rows
from starlm.model.folder import MANIFEST
from starlm.model.model import Backbone, Headed, StarLM
from starlm.model.step import MODULES
from starlm.nn.block import Block

# Tokens of a draft that assisted generation may take back from a bounded state. Drafts grow by 2 tokens with
# each that was right to the end, from 20 on.
DRAFT = 512
# Where documents begin in a batch without padding, for kernels of attention and of Mamba.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


class StarLMBlock(GradientCheckpointingLayer, Block):
    """A `Block` that forgets its activations, if asked, and computes them again for the gradients."""


# A step in one piece does what they do: `GradientCheckpointingLayer` is for training.
MODULES[StarLMBlock] = StarLMBlock.forward


class StarLMModel(Backbone, PreTrainedModel):
    """Embedding and blocks: the residual stream (`AutoModel`).

    Padding on either side and packed documents are exact: `attention_mask` with zeros before or after a
    sequence, or `position_ids` that start again where a document begins, give what each sequence gives alone.
    """

    config_class = StarLMHFConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["StarLMBlock"]  # noqa: RUF012
    _input_embed_layer = "embedding"
    # The head, in files of the causal model.
    _keys_to_ignore_on_load_unexpected = [r"^head\.weight$"]  # noqa: RUF012

    def __init__(self, config: StarLMHFConfig) -> None:
        super().__init__(config)
        self._take(StarLM(config.shape))
        self.post_init()

    def _take(self, model: StarLM) -> None:
        self.orders, self.embedding = model.orders, model.embedding
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.blocks = nn.ModuleList(StarLMBlock(block.mixer, block.mlp) for block in blocks)

    def init_weights(self) -> None:
        """Nothing: the constructor starts the weights, by the model's own recipe."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Start the weights that no file gave, by the same recipe."""
        missing = {n: p for n, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
        if missing:
            fresh = dict(StarLM(self.config.shape).named_parameters())
            for name in missing.keys() & fresh.keys():
                missing[name].copy_(fresh[name])

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: `auto_map` names a file that imports this package, so no source need be copied."""

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; a manifest there is removed, as it describes what is written over."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / MANIFEST).unlink(missing_ok=True)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StarLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The residual stream after the last block.

        Args:
            input_ids: [B, T].
            attention_mask: [B, tokens in the cache + T], 0 for padding before or after a sequence.
            position_ids: [B, T]; a document begins where they do not go up by 1.
            cache: of the tokens so far; gets these appended.
            inputs_embeds: [B, T, D], in place of the embeddings of `input_ids`; anchored heads need both.
            use_cache: begin a cache, if none is given. Only when asked, as `generate` does: nothing else
                needs one, and it takes time and memory.
            output_hidden_states: also what each block reads, the embeddings normalised first; the last one is
                the result.
            kwargs: what transformers says to other models; without effect.

        Raises:
            InputError: tokens of another shape, masks or positions that StarLM has no meaning for, documents
                that something else parts, another model's cache, or neither tokens nor what stands for them.
        """
        tokens = self._tokens(input_ids, inputs_embeds)
        self._check(tokens, None, None)
        packed = [name for name in _PACKED if kwargs.get(name) is not None]
        if packed and position_ids is None:
            raise InputError(
                f"StarLM does not read {packed[0]}. Give position_ids that begin at 0 with each document, as "
                f"DataCollatorWithFlattening does by default."
            )
        batch, length = tokens.shape
        # What is computed again for the gradients would be appended again.
        recomputed = self.is_activation_checkpointing and self.training and torch.is_grad_enabled()
        if cache is None and use_cache and not recomputed:
            cache = StarLMCache(self.new_state(batch))
        if cache is not None and not isinstance(cache, StarLMCache):
            raise InputError(
                f"StarLM keeps its past in a StarLMCache; got a {type(cache).__name__}. Leave the cache out, "
                f"or give StarLMCache(model.new_state(batch))."
            )
        past = 0 if cache is None else cache.get_seq_length()
        state = None if cache is None else cache.state
        self._check(tokens, None, state)
        begun = [] if state is None else [slot.first for slot in state.slots]
        first = first_rows(attention_mask, position_ids, batch=batch, length=length, past=past, begun=begun)
        if first is not None and state is not None:
            # Where a neighbour begins a document, who goes on with one still begins where it began.
            began = state.first(length, first.device)
            first = first if began is None else torch.maximum(first, began)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        seen: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.hidden(tokens, embedded=inputs_embeds, first=first, state=state, seen=seen)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, cache=cache, hidden_states=None if seen is None else tuple(seen)
        )

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The token ids; without them, and where nothing is anchored to them, zeros."""
        if input_ids is not None:
            return input_ids
        if inputs_embeds is None:
            raise InputError("Give input_ids, or inputs_embeds.")
        if self.orders:
            raise InputError(
                "This model has heads that are anchored to n-grams of token ids, so inputs_embeds alone are "
                "not enough. Give the input_ids too, to the model itself: generate drops them where there "
                "are inputs_embeds."
            )
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)


class StarLMForCausalLM(Headed, StarLMModel, GenerationMixin):
    """The language model (`AutoModelForCausalLM`): `StarLMModel` and a head, with the logits of `StarLM`."""

    _keys_to_ignore_on_load_unexpected = None

    def _take(self, model: StarLM) -> None:
        super()._take(model)
        self.head = model.head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: what is made by default is made here."""
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a cache into `model_kwargs`, unless there is one or none is wanted."""
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if model_kwargs.get("cache") is None and generation_config.use_cache:
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            drafts = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
            rollback = max(DRAFT, generation_config.prompt_lookup_num_tokens or 0) if drafts else 0
            model_kwargs["cache"] = StarLMCache(self.new_state(batch_size * copies, rollback=rollback))

    @property
    def base_model(self) -> StarLMModel:
        """The model without its head, on the same modules. TRL runs it, and the head on the rows it needs."""
        trunk = StarLMModel.__new__(StarLMModel)
        PreTrainedModel.__init__(trunk, self.config)
        trunk.orders, trunk.embedding, trunk.blocks = self.orders, self.embedding, self.blocks
        # Not `train`, which would reach the modules, of which some may be in another mode.
        trunk.training = self.training
        return trunk

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place."""
        self.head = cast(nn.Linear, new_embeddings)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StarLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the token after each, in fp32; arguments as for `StarLMModel.forward`.

        Args:
            labels: [B, T], the tokens themselves, -100 for those that the loss leaves out: it shifts them.
            logits_to_keep: of the last so many tokens only, 0 is all; or the indices of those wanted.
        """
        outputs = super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state
        assert hidden is not None
        logits = self.logits(hidden[:, kept], step=outputs.cache is not None)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )
