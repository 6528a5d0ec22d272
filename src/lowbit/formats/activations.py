"""What the inputs of products and the KV cache may hold."""

ACTIVATIONS = ("int8", "int16")
KV_BITS = (2, 4, 8, 16)  # 8 and less: integers; 4 and 2 in pages of 64 positions


def default_kv_bits(activations: str) -> int:
    """8 with int8 activations, whose perplexity it does not change; with int16 attention stays exact."""
    return 8 if activations == "int8" else 16
