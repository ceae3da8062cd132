"""StarLM in Hugging Face transformers: importing this room registers its classes. Imports model and data.

    import starlm.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("runs/demo/checkpoints/step-000240")
    tokenizer = AutoTokenizer.from_pretrained("runs/demo/checkpoints/step-000240")

Without the import, `trust_remote_code=True` does the same: each checkpoint has a file of a few lines that
imports this room, so the package must be installed either way.
"""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from starlm.hf.cache import StarLMCache
from starlm.hf.config import StarLMHFConfig
from starlm.hf.model import StarLMForCausalLM, StarLMModel

__all__ = ["StarLMCache", "StarLMForCausalLM", "StarLMHFConfig", "StarLMModel"]

AutoConfig.register("starlm", StarLMHFConfig)
AutoModel.register(StarLMHFConfig, StarLMModel)
AutoModelForCausalLM.register(StarLMHFConfig, StarLMForCausalLM)
# Here Trainer looks whether it must shift labels that it smooths, and a pipeline whether it knows the class.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["starlm"] = "StarLMForCausalLM"
# `transformers serve` asks none of these, but the package itself for the class that config.json names; and
# there can be two objects of the package in one process, so their type answers.
type(transformers).StarLMForCausalLM = StarLMForCausalLM  # type: ignore[attr-defined]
