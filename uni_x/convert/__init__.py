"""Models of others to ours, and back."""

# names of the backbone's sizes in the configurations of Qwen and Llama, and in ours
BACKBONE_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
)
