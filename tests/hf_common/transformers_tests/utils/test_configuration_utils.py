"""Values other than the defaults for fields that every configuration has."""

config_common_kwargs = {
    "architectures": ["SomeModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "first", 1: "second"},
    "is_encoder_decoder": True,
    "label2id": {"first": 0, "second": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
