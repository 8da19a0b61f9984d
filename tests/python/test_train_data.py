"""What the trainer reads: files, token memmaps, tokenizers, batches."""

import json

import numpy as np
import pytest
import torch

from based_model import generate, train
from based_model.config import ConfigError
from based_model.data import (
    WindowSampler,
    compressed_bits_per_byte,
    load_corpus,
    stdlib_files,
    valid_batches,
)
from based_model.text import SEPARATOR, text_to_train_on
from training import folder_fixture, one_thread_fixture, settings_fixture  # noqa: F401


def test_stdlib_is_found_in_a_fixed_order_without_its_tests():
    files = stdlib_files()
    assert len(files) > 200 and files == stdlib_files()
    assert not [f for f in files if {"site-packages", "test"} & set(f.parts)]


def test_split_keeps_held_out_files_apart(folder):
    names = sorted(folder.iterdir())
    (folder / "copy.py").write_bytes(names[3].read_bytes())
    corpus = load_corpus((folder,), valid_share=0.3)
    held_out = set(corpus.valid_files)
    assert held_out and not held_out & set(corpus.train_files)
    assert len(corpus.train_files) + len(corpus.valid_files) == 41
    assert (folder / "copy.py" in held_out) == (names[3] in held_out)
    for text, paths in ((corpus.train, corpus.train_files), (corpus.valid, corpus.valid_files)):
        assert text.tobytes() == b"".join(p.read_bytes() + bytes([SEPARATOR]) for p in paths)
    # Which side a file is on does not depend on the others.
    fewer = load_corpus(tuple(names[:20]), valid_share=0.3)
    assert set(fewer.valid_files) == held_out & set(names[:20])


def test_given_held_out_files_are_not_trained_on(folder):
    corpus = load_corpus((folder,), (folder / "07.py",))
    assert corpus.valid_files == (folder / "07.py",)
    assert len(corpus.train_files) == 39 and folder / "07.py" not in corpus.train_files


def test_a_single_file_gives_its_tail(folder):
    corpus = load_corpus((folder / "00.py",), valid_share=0.25)
    whole = (folder / "00.py").read_bytes() + bytes([SEPARATOR])
    assert corpus.train.tobytes() + corpus.valid.tobytes() == whole
    assert len(corpus.valid) == pytest.approx(len(whole) / 4, abs=1)


def test_folders_give_their_visible_text_files(folder):
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.py").write_text("secret")
    (folder / "binary").write_bytes(b"a\0b")
    (folder / "inner").mkdir()
    (folder / "inner" / "notes.txt").write_text("text")
    corpus = load_corpus((folder,), valid_share=0.3)
    names = {path.name for path in (*corpus.train_files, *corpus.valid_files)}
    assert names == {f"{i:02}.py" for i in range(40)} | {"notes.txt"}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_memmaps(tmp_path, dtype):
    tokens = np.arange(1000, 1100, dtype=dtype)
    tokens.tofile(tmp_path / "train.bin")
    tokens[:7].tofile(tmp_path / "valid.bin")
    corpus = load_corpus((tmp_path / "train.bin",), valid_share=0.1, token_dtype=dtype)
    assert isinstance(corpus.train, np.memmap) and corpus.valid_text is None
    assert corpus.train.tolist() + corpus.valid.tolist() == tokens.tolist()
    assert len(corpus.valid) == 10
    corpus = load_corpus((tmp_path / "train.bin",), (tmp_path / "valid.bin",), token_dtype=dtype)
    assert len(corpus.train) == 100 and corpus.valid.tolist() == tokens[:7].tolist()


def test_unusable_data_is_a_named_error(folder):
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "nul.txt").write_bytes(b"a\0")
    with pytest.raises(ConfigError, match="expected a file or folder, got .*nowhere"):
        load_corpus((folder / "nowhere",))
    with pytest.raises(ConfigError, match="NUL bytes"):
        load_corpus((folder / "nul.txt",))
    with pytest.raises(ConfigError, match="whole uint16 tokens, got .*odd.bin"):
        load_corpus((folder / "odd.bin",))
    with pytest.raises(ConfigError, match="at most one .bin held out"):
        load_corpus((folder / "odd.bin", folder / "00.py"))
    with pytest.raises(ConfigError, match="and 0 tokens of 0 files"):
        load_corpus((folder,), valid_share=1e-9)


def test_sampler_is_seeded_and_continues_from_its_state():
    tokens = np.arange(200, dtype=np.uint8)
    sampler, same = (WindowSampler(tokens, 3, 7, seed=5) for _ in range(2))
    inputs, targets = next(sampler)
    assert inputs.shape == targets.shape == (3, 7) and inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(next(same)[0], inputs)
    state = json.loads(json.dumps(sampler.state_dict()))
    other = WindowSampler(tokens, 3, 7, seed=6)
    other.load_state_dict(state)
    assert torch.equal(next(other)[0], next(sampler)[0])
    with pytest.raises(ConfigError, match="seqlen: expected fewer than the 200 tokens"):
        WindowSampler(tokens, 3, 200, seed=0)


@pytest.mark.parametrize("length", [2, 8, 9, 30, 57])
def test_evaluation_predicts_every_token_once(length):
    tokens = np.arange(length, dtype=np.uint8)
    batches = list(valid_batches(tokens, batch_size=2, seqlen=8))
    targets = torch.cat([y.flatten() for _, y in batches])
    assert targets.tolist() == list(range(1, length))


def test_evaluation_of_a_part_is_spread_over_the_text():
    tokens = np.arange(100, dtype=np.uint8)
    starts = [x[:, 0].tolist() for x, _ in valid_batches(tokens, 2, seqlen=8, every=3)]
    assert starts == [[0, 24], [48, 72]]
    assert [x.shape for x, _ in valid_batches(tokens[:5], 2, seqlen=8, every=3)] == [(1, 4)]


def test_compressors_are_measured_per_byte():
    bits = compressed_bits_per_byte(b"ab" * 5000)
    assert 0 < bits["gzip"] < 0.2 and 0 < bits["xz"] < 0.2


@pytest.fixture
def tokenizer(folder, tmp_path):
    """A tokenizer.json of byte pairs that occur in the made-up files."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    files = [str(path) for path in sorted(folder.iterdir())]
    made.train(files, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer_makes_tokens_of_text_files(folder, tokenizer):
    (folder / "umlaut.py").write_text("# ä€😀\n" * 30)
    text = text_to_train_on(tokenizer, "<|endoftext|>")
    bytes_, tokens = (load_corpus((folder,), valid_share=0.3, text=t) for t in (None, text))
    assert tokens.vocab_size == 300 and tokens.valid_files == bytes_.valid_files
    assert tokens.train.dtype == np.uint16 and len(tokens.train) < len(bytes_.train) / 2
    for ours, theirs in ((tokens.train, bytes_.train), (tokens.valid, bytes_.valid)):
        assert text.decode_all(ours) == theirs.tobytes()
    assert tokens.valid_text == bytes_.valid_text == bytes_.valid.tobytes()
    # A loss of as many nats over the whole text is as many bits per byte.
    nats = 1000.0
    per_byte = bytes_.bits_per_byte(nats / len(bytes_.valid))
    assert tokens.bits_per_byte(nats / len(tokens.valid)) == pytest.approx(per_byte)


@pytest.mark.parametrize("size", range(8, 20))
def test_held_out_text_is_cut_between_characters(tmp_path, tokenizer, size):
    (tmp_path / "train.txt").write_text("a" * 50)
    (tmp_path / "valid.txt").write_text("ä€😀" * 9)
    files = (tmp_path / "train.txt",), (tmp_path / "valid.txt",)
    text = text_to_train_on(tokenizer, "<|endoftext|>")
    corpus = load_corpus(*files, text=text, max_valid=size)
    assert size <= len(corpus.valid_text) < size + 4
    assert text.decode_all(corpus.valid) == corpus.valid_text


def test_token_memmaps_have_a_text_if_their_tokenizer_is_given(folder, tmp_path, tokenizer):
    text = text_to_train_on(tokenizer, "<|endoftext|>")
    corpus = load_corpus((folder,), valid_share=0.3, text=text)
    corpus.train.tofile(tmp_path / "train.bin")
    corpus.valid.tofile(tmp_path / "valid.bin")
    files = (tmp_path / "train.bin",), (tmp_path / "valid.bin",)
    memmap = load_corpus(*files, text=text)
    assert memmap.valid_text == corpus.valid_text and memmap.vocab_size == 300
    assert memmap.fingerprint() == corpus.fingerprint()


def test_unusable_tokenizers_are_named_errors(folder, tokenizer):
    with pytest.raises(ConfigError, match="end_token: expected a token of .*got '<eos>'"):
        text_to_train_on(tokenizer, "<eos>")
    (folder / "latin1.py").write_bytes(b"\xe4")
    with pytest.raises(ConfigError, match="expected UTF-8 text, got .*latin1.py"):
        load_corpus((folder,), text=text_to_train_on(tokenizer, "<|endoftext|>"))


def test_a_model_of_tokens_is_trained_and_continued(settings, tmp_path, tokenizer, capsys):
    run = tmp_path / "run"
    results = train.train(settings(run, tokenizer=tokenizer, sample_tokens=20))
    out = capsys.readouterr().out
    assert "held-out bits per byte: model" in out and "def " in out
    assert 0 < results["valid_bits_per_byte"] < results["valid_loss"]
    assert (run / "step-00000012" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    generate.run(generate.GenerateConfig(checkpoint=run, prompt=("def f",), max_new_tokens=5))
    assert capsys.readouterr().out.startswith("def f")
    with pytest.raises(ConfigError, match="vocab_size: expected the 300 tokens of the text"):
        train.train(settings(tmp_path / "other", tokenizer=tokenizer, vocab_size=400))
