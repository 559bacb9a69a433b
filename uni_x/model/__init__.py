"""The model. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from uni_x.model.cache import UniXCache
from uni_x.model.causal_lm import UniXForCausalLM, UniXModel, UniXOutput
from uni_x.model.config import UniXConfig

AutoConfig.register(UniXConfig.model_type, UniXConfig, exist_ok=True)
AutoModel.register(UniXConfig, UniXModel, exist_ok=True)
AutoModelForCausalLM.register(UniXConfig, UniXForCausalLM, exist_ok=True)

__all__ = ["UniXCache", "UniXConfig", "UniXForCausalLM", "UniXModel", "UniXOutput"]
