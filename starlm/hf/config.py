"""StarLMConfig as a transformers config."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from starlm.errors import InputError
from starlm.model.checkpoint import AUTO_MAP, write_remote_code
from starlm.model.config import StarLMConfig
from starlm.model.folder import check_untied
from starlm.settings import from_dict, to_dict

_FIELDS = tuple(field.name for field in fields(StarLMConfig))
# Names that others look for, and the fields that say them, 0 for what follows from the rest.
_DERIVED = {"hidden_size": "dim", "num_attention_heads": "heads"}


class StarLMHFConfig(PreTrainedConfig):
    """The fields of `StarLMConfig`, with its defaults and its checks, beside those of `PreTrainedConfig`.

    Names that other libraries look for are derived: `hidden_size`, `num_hidden_layers`,
    `num_attention_heads`, `max_position_embeddings` (the context of training; generation may go further).

    Example:
        >>> config = StarLMHFConfig(depth=2, preset="gated")
        >>> config.hidden_size, config.shape.num_heads
        (128, 4)
    """

    model_type = "starlm"
    attribute_map = {"num_hidden_layers": "depth", "max_position_embeddings": "context"}  # noqa: RUF012

    def __post_init__(self, **kwargs: Any) -> None:
        """Args: kwargs: fields of `StarLMConfig`, and what `PreTrainedConfig` takes.

        Raises:
            InputError: an impossible value, or two that contradict each other.
        """
        own = self.attribute_map | _DERIVED
        # As in a file that was written.
        beside = {name: kwargs.pop(name) for name, field in own.items() if {name, field} <= kwargs.keys()}
        renamed = {own.get(name, name): value for name, value in kwargs.items()}
        given = {name: renamed.pop(name) for name in _FIELDS if name in renamed}
        for name, value in to_dict(from_dict(StarLMConfig, given, where="the config")).items():
            setattr(self, name, value)
        for name, value in beside.items():
            if value not in (None, getattr(self, name)):
                means = f", which means {getattr(self, name)}" if name in _DERIVED else ""
                raise InputError(
                    f"The config says {name} {value}, but {own[name]} {given[own[name]]}{means}. Give one of "
                    f"the two alone."
                )
        self.bos_token_id = self.eos_token_id = self.pad_token_id = None
        self.auto_map = dict(AUTO_MAP)
        check_untied(renamed.get("tie_word_embeddings"), "the config")
        super().__post_init__(**renamed)

    @property
    def shape(self) -> StarLMConfig:
        """What the model is, as StarLM has it.

        Raises:
            InputError: an impossible value was set.
        """
        return from_dict(StarLMConfig, {name: getattr(self, name) for name in _FIELDS}, where="the config")

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return self.shape.width

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self.dim = value

    @property
    def final_logit_softcapping(self) -> float | None:
        """The softcap, by the name under which trainers look for it that compute logits themselves."""
        return self.softcap or None

    @final_logit_softcapping.setter
    def final_logit_softcapping(self, value: float | None) -> None:
        self.softcap = value or 0.0

    @property
    def num_attention_heads(self) -> int:
        """Heads per layer."""
        return self.shape.num_heads

    @num_attention_heads.setter
    def num_attention_heads(self, value: int) -> None:
        self.heads = value

    def to_dict(self) -> dict[str, Any]:
        """All values, also by the names that other libraries look for."""
        names = (*self.attribute_map, *_DERIVED)
        return super().to_dict() | {name: getattr(self, name) for name in names}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any):
        """Write config.json, and the file that lets others load the model by `trust_remote_code=True`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_remote_code(Path(save_directory))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: `auto_map` names a file that imports this package, so no source need be copied."""
