"""Low-rank adapters of peft on an encoder of transformers."""

from __future__ import annotations

from pathlib import Path

from fastmtl.data import find_encoder


def test_only_adapters_are_trained(tmp_path: Path) -> None:
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=30, **sizes).save_pretrained(tmp_path)
    encoder = find_encoder(f"hf:{tmp_path}", {"lora": 4, "lora_alpha": 8}).value.build()
    trained = [name for name, param in encoder.named_parameters() if param.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert {param.shape[0] for name, param in encoder.named_parameters() if "lora_A" in name} == {4}
    query = find_encoder(f"hf:{tmp_path}", {"lora": 4, "target_modules": ["query"]}).value.build()
    assert all("query" in name for name, param in query.named_parameters() if param.requires_grad)
