"""Models of transformers, made from a configuration in a folder: texts with their tokenizer, images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtl import load
from fastmtl.cli import main
from fastmtl.data import find_encoder
from fastmtl.errors import FastmtlError, UsageError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "phone", "a", "the", "very"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a small BERT's configuration, its weights and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return folder


def _texts(folder: Path) -> Path:
    """Write a data set of texts as a module, and return its file."""
    file = folder / "texts.py"
    file.write_text(
        """
import torch
from fastmtl.data import DatasetInfo, classes

TEXTS = ["a good film", "the bad phone", "a very very bad film", "good phone"] * 8

def labels(text):
    return {"mood": torch.tensor(int("good" in text)), "topic": torch.tensor(int("film" in text))}

ROWS = [(text, labels(text)) for text in TEXTS]

def make():
    return DatasetInfo(
        tasks={"mood": classes(["bad", "good"]), "topic": classes(["phone", "film"])},
        load_splits=lambda options: options.splits(train=ROWS, test=ROWS[:8]),
        read_row=lambda row, facts: row["text"],
    )
"""
    )
    return file


def test_texts_are_pooled_over_their_words(bert: Path) -> None:
    about = find_encoder(f"hf:{bert}").value
    assert (about.feature_dim, about.has_weights) == (16, True)
    encoder = about.build().eval()
    short, long = about.tokenize(["good film"]), about.tokenize(["good film", "a very very very bad film"])
    with torch.no_grad():
        alone, beside = encoder(short), encoder(long)
    # Padding changes nothing.
    torch.testing.assert_close(alone[0], beside[0], atol=1e-6, rtol=1e-5)
    first = find_encoder(f"hf:{bert}", {"pool": "first"}).value.build()
    assert first(short).shape == (1, 16)


def test_pairs_of_sentences_train_by_the_recipe_of_pawsx(bert: Path, tmp_path: Path) -> None:
    about = find_encoder(f"hf:{bert}").value
    assert about.tokenize is not None
    pair = about.tokenize([("good film", "bad phone")])
    assert pair["input_ids"].tolist() == [[2, 5, 7, 3, 6, 8, 3]]
    data = tmp_path / "pawsx"
    data.mkdir()
    for language in ("en", "zh", "de", "es"):
        for split in ("train", "dev", "test"):
            lines = ["sentence1\tsentence2\tlabel", *(f"good film\tvery good phone\t{row % 2}" for row in range(8))]
            (data / f"{split}-{language}.tsv").write_text("\n".join(lines) + "\n")
    command = ["train", "--recipe", "pawsx", "--scale", "small", "--encoder", f"hf:{bert}", "--batch-size", "4"]
    command += [
        "--train-size",
        "8",
        "--dataset-path",
        str(data),
        "--weighting",
        "mgda",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--no-plot", "--no-tensorboard"]) == 0


def test_weights_are_the_folder_s_if_asked_for(bert: Path) -> None:
    build = find_encoder(f"hf:{bert}").value.build
    one, two, fresh = build(pretrained=True), build(pretrained=True), build()
    key = "model.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(one.state_dict()[key], two.state_dict()[key], rtol=0, atol=0)
    assert not torch.equal(one.state_dict()[key], fresh.state_dict()[key])


def test_the_command_trains_exports_and_predicts_texts(bert: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--dataset", f"{_texts(tmp_path)}:make", "--encoder", f"hf:{bert}", "--pretrained", "--weighting", "mgda"]
    assert main(["train", *words, "--batch-size", "8", "--lr", "3e-3", "--epochs", "8", "--run-dir", str(run)]) == 0
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a good film", "the bad phone")))
    assert main(["predict", str(run), str(new)]) == 0
    lines = [json.loads(line) for line in (run / "predictions" / "predictions.jsonl").read_text().splitlines()]
    assert [(line["mood"]["class"], line["topic"]["class"]) for line in lines] == [("good", "film"), ("bad", "phone")]
    model = load(run)
    assert set(model.predict([{"text": "good film"}])) == {"mood", "topic"}
    # Two texts, of which one is padded; five; and longer ones than any of the training.
    batches = [["a good film", "phone"], ["film"] * 5, ["the very very very very very very bad film", "a phone"]]
    read = [model.read([{"text": text} for text in texts]) for texts in batches]
    assert len({inputs["input_ids"].shape[1] for inputs in read}) == 3
    for format in ("pt2", "onnx"):
        assert main(["export", str(run), "--format", format]) == 0
        call = _program(run / "export" / f"model.{format}")
        for inputs in read:
            with torch.no_grad():
                wanted = model(inputs)
            got = call(inputs)
            for task, pred in wanted.items():
                torch.testing.assert_close(got[task], pred, rtol=1e-4, atol=1e-4)


def _program(path: Path) -> Any:
    """Return what calls an exported program."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    wanted = [entry.name for entry in session.get_inputs()]

    def call(inputs: Any) -> dict[str, torch.Tensor]:
        values = session.run(None, {name: inputs[name].numpy() for name in wanted})
        return dict(zip(names, map(torch.from_numpy, values), strict=True))

    return call


def test_images_give_maps(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ViTConfig

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    ViTConfig(image_size=32, patch_size=8, **sizes).save_pretrained(tmp_path / "vit")
    ConvNextConfig(hidden_sizes=[8, 8, 8, 24], depths=[1, 1, 1, 1], image_size=64).save_pretrained(tmp_path / "conv")
    for name, size, shape in (("vit", 32, (2, 16, 4, 4)), ("conv", 64, (2, 24, 2, 2))):
        about = find_encoder(f"hf:{tmp_path / name}").value
        assert about.image.size == (size, size)
        assert about.build()(torch.randn(2, 3, size, size)).shape == shape


STATED = """
import json, sys
from pathlib import Path
from fastmtl.data import find_encoder

stated = []
for file, content, _ in json.loads(sys.argv[2]):
    (Path(sys.argv[1]) / file).write_text(json.dumps(content))
    for name in ("me/tiny", sys.argv[1]):
        image = find_encoder(f"hf:{name}").value.image
        stated.append([image.mean[0], image.std[0]])
print(json.dumps(stated))
"""


def test_images_are_normalised_as_the_model_s_preprocessor_says(tmp_path: Path) -> None:
    from transformers import ViTConfig

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    # As the hub's cache has a model after a download.
    repository = tmp_path / "hub" / "models--me--tiny"
    folder = repository / "snapshots" / "0123456789012345678901234567890123456789"
    ViTConfig(image_size=32, patch_size=8, intermediate_size=16, **sizes).save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(folder.name)

    written: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    cases: list[tuple[str, dict[str, Any], list[float]]] = [
        ("other.json", {}, [0.485, 0.229]),
        ("preprocessor_config.json", written, [0.5, 0.25]),
        ("preprocessor_config.json", {**written, "do_normalize": False}, [0, 1]),
        # Mean and deviation of pixels from 0 to 2.
        ("preprocessor_config.json", {**written, "rescale_factor": 2 / 255}, [0.25, 0.125]),
        ("processor_config.json", {"image_processor": {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}}, [0.4, 0.2]),
    ]
    # The hub's settings are read when it is imported.
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", STATED, str(folder), json.dumps(cases)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    stated = json.loads(done.stdout)
    assert len(stated) == 2 * len(cases)
    for place, numbers in enumerate(stated):
        assert numbers == pytest.approx(cases[place // 2][2]), (place, cases[place // 2])


def test_mistakes_are_one_sentence(bert: Path, tmp_path: Path) -> None:
    for name, args, message in (
        (f"hf:{tmp_path / 'nothing'}", {}, "must be a folder with a config.json"),
        (f"hf:{bert}", {"hiden": 3}, "has no setting 'hiden'"),
        (f"hf:{bert}", {"length": 33}, "must be a number of tokens from 1 to 32, which .* can read, got 33"),
        (f"hf:{bert}", {"length": "all"}, "must be a number of tokens from 1 to 32"),
    ):
        with pytest.raises(UsageError, match=message):
            find_encoder(name, args)
    with pytest.raises(UsageError, match="pool must be mean or first"):
        find_encoder(f"hf:{bert}", {"pool": "last"}).value.build()


def test_a_name_that_nobody_can_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[float] = []

    def unreachable(url: str, timeout: float) -> None:
        asked.append(timeout)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(FastmtlError, match=r"hf:nobody/nothing is not among the models .* cannot be reached: give a"):
        find_encoder("hf:nobody/nothing")
    # Once, and not for long.
    assert asked == [5.0]
