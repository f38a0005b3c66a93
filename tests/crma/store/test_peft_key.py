"""The names of tensors in PEFT's files."""

import pytest

from crma.store.peft_key import PREFIX, WRITTEN, PeftKey, parse_key

PATH = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("ending", "part", "adapter"),
    [
        ("lora_A.weight", "A", None),
        ("lora_B.default.weight", "B", "default"),
        ("lora_B.bias", "lora_bias", None),
        ("lora_embedding_A", "embedding_A", None),
        ("lora_embedding_B.mine", "embedding_B", "mine"),
        ("lora_magnitude_vector", "magnitude", None),
        ("lora_magnitude_vector.weight", "magnitude", None),
        ("lora_magnitude_vector.weight.weight", "magnitude", "weight"),
        ("base_layer.weight", "weight", None),
    ],
)
def test_a_name_says_module_part_and_adapter(ending: str, part: str, adapter: str | None) -> None:
    assert parse_key(f"{PREFIX}{PATH}.{ending}") == PeftKey(PATH, part, adapter)


@pytest.mark.parametrize("part", WRITTEN)
def test_a_name_that_is_written_is_read(part: str) -> None:
    assert parse_key(f"{PREFIX}{PATH}.{WRITTEN[part]}") == PeftKey(PATH, part, None)


@pytest.mark.parametrize(
    "key",
    [
        f"{PATH}.lora_A.weight",
        f"{PREFIX}lora_A.weight",
        f"{PREFIX}{PATH}.weight",
        f"{PREFIX}{PATH}.lora_A.bias",
        f"{PREFIX}{PATH}.lora_A.a.b.weight",
        f"{PREFIX}{PATH}.lora_A.{'a' * 3000}.weight",
        f"{PREFIX}../{PATH}.lora_A.weight",
        f"{PREFIX}{'a.' * 17}lora_A.weight",
        f"{PREFIX}{PATH}.lora_A",
        PREFIX,
    ],
)
def test_another_name_is_none(key: str) -> None:
    assert parse_key(key) is None
