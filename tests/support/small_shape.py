"""The shape of the random students that tests make, by the names most architectures use."""

SMALL_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    # Ten times the usual: logits spread over several nats, as a trained model's do.
    "initializer_range": 0.2,
}
