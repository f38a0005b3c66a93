"""A tiny Llama that three processes of vLLM can share."""

# Heads as vLLM's kernels for CPUs take them. The last 84 rows of embedding and head are no tokens.
SHARED_HEADS = {
    "vocab_size": 384,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
