"""The bundled tokenizer and the tiny model: reproducible, complete, and what engines expect."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dynamo_workers.tiny import (
    SPECIAL_TOKENS,
    TOKENIZER_FOLDER,
    is_tiny_model,
    write_adapter,
    write_model,
)
from dynamo_workers.tiny.model import to_bfloat16
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER_FOLDER / "tokenizer.json"))


def test_training_gives_the_committed_files():
    command = [sys.executable, "-m", "dynamo_workers.tiny.train", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@given(text=st.text())
def test_every_text_survives_a_round_trip(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(left=st.text(), right=st.text(), token=st.sampled_from(SPECIAL_TOKENS))
def test_special_tokens_split_texts_exactly(
    tokenizer: Tokenizer, left: str, right: str, token: str
):
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    whole = encode(left + token + right)
    assert whole == [*encode(left), SPECIAL_TOKENS.index(token), *encode(right)]


def test_adapters_are_the_same_each_time_and_differ_by_seed(tmp_path: Path):
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        write_adapter(tmp_path / name, seed=seed)
    read = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc"
    }
    assert read["a"] == read["b"] != read["c"]
    assert is_tiny_model(tmp_path / "a")


def test_model_folder_is_complete_and_the_same_each_time(tmp_path: Path):
    for name in ("a", "b"):
        write_model(tmp_path / name, seed=3)
    write_model(tmp_path / "c", seed=4)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ac"]
    assert weights[0] != weights[1]


def test_weights_have_the_shapes_that_the_config_asks_for(tmp_path: Path, tokenizer: Tokenizer):
    write_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    hidden, width = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    first = "model.layers.0.self_attn"
    assert header["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], hidden]
    assert header[f"{first}.q_proj.weight"]["shape"] == [heads * width, hidden]
    assert header[f"{first}.k_proj.weight"]["shape"] == [kv_heads * width, hidden]
    assert len(header) == 3 + 9 * config["num_hidden_layers"]
    # The ranges cover the rest of the file without a gap, in order.
    position = 0
    for entry in header.values():
        begin, end = entry["data_offsets"]
        assert (begin, end - begin) == (position, 2 * int(np.prod(entry["shape"])))
        position = end
    assert position == len(data) - 8 - size


@given(
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100
    )
)
def test_bfloat16_is_the_nearest(value: float):
    bits = to_bfloat16(np.asarray([value], np.float32)).astype(np.uint32)

    def as_float(half: np.ndarray) -> float:
        return float((half.astype(np.uint32) << np.uint32(16)).view(np.float32)[0])

    error = abs(as_float(bits) - value)
    for neighbour in (bits - np.uint32(1), bits + np.uint32(1)):
        assert error <= abs(as_float(neighbour & np.uint32(0xFFFF)) - value) or np.isnan(
            as_float(neighbour & np.uint32(0xFFFF))
        )


def test_a_folder_is_recognised_as_the_models_own(tmp_path: Path):
    assert not is_tiny_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not is_tiny_model(tmp_path)
    write_model(tmp_path)
    assert is_tiny_model(tmp_path)


def test_command_writes_again_but_never_over_other_files(tmp_path: Path):
    import typer
    from dynamo_cli.model_command import tiny
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(tiny)
    runner = CliRunner()
    out = tmp_path / "model"
    assert runner.invoke(app, ["--out", str(out)]).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert runner.invoke(app, ["--out", str(out)]).exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    refused = runner.invoke(app, ["--out", str(other)])
    assert refused.exit_code == 2
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    assert runner.invoke(app, ["--out", str(other), "--force"]).exit_code == 0
    assert is_tiny_model(other)
    assert (other / "thesis.txt").read_text() == "years of work"
