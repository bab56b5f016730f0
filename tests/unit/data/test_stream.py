"""Streams: every row once a pass, another order each pass, taken up anywhere, dealt out to ranks, never in memory."""

import gzip
import json

import datasets
import pytest
from lightning import seed_everything

from hfprune import LoraRecovery, PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.data.stream import POSITION
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def rows(count):
    letters = "aeiostnr"
    names = [f"{letters[n // 8 % 8]} {letters[n % 8]} {letters[-(n % 8) - 1]}" for n in range(count)]
    return [{"text": f"{name} " + "the while is a " * (n % 4)} for n, name in enumerate(names)]


def jsonl(path, count=23):
    text = "\n".join(map(json.dumps, rows(count))) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def loader(tokenizer, source, *, rank=0, num_replicas=1, **kwargs):
    data = TextDataModule(
        recovery=source, streaming=True, **{"seq_len": 32, "batch_size": 3, "shuffle_buffer": 5, "seed": 1} | kwargs
    )
    data.bind(tokenizer, vocab_size=61, max_positions=64)
    return data._loaders.stream(data._stream, shuffle_buffer=data.shuffle_buffer, num_replicas=num_replicas, rank=rank)


def documents(batches):
    """The first three tokens of every document are its name."""
    found = []
    for batch in batches:
        positions = batch.get("position_ids")
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            starts = [0] if positions is None else ((positions[row] == 0) & (mask > 0)).nonzero().flatten().tolist()
            found += [tuple(ids[start : start + 3].tolist()) for start in starts]
    return found


def trained(loader):
    """Yields the batches of a pass, each of which goes into training."""
    for batch in loader:
        loader.trained(batch)
        yield batch


def same(one, other):
    return len(one) == len(other) and all(
        all(a[name].equal(b[name]) for name in a) and a.keys() == b.keys() for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "saved"])
def test_every_row_once_a_pass_in_another_order(tokenizer, tmp_path, name, packing):
    path = tmp_path / name
    if name.startswith("a.jsonl"):
        jsonl(path)
    else:
        data = datasets.Dataset.from_list(rows(23))
        data.to_parquet(path) if name == "a.parquet" else data.save_to_disk(path)
    found = loader(tokenizer, str(path), packing=packing)
    first, second = documents(found), documents(found)
    assert len(set(first)) == len(first) == 23
    assert set(first) == set(second)
    assert first != second
    assert first != sorted(first)
    assert documents(loader(tokenizer, str(path), packing=packing)) == first


@pytest.mark.parametrize("packing", [False, True])
def test_taken_up_anywhere(tokenizer, tmp_path, packing):
    source = jsonl(tmp_path / "a.jsonl")
    whole = loader(tokenizer, source, packing=packing)
    batches = [*trained(whole), *trained(whole)]
    for taken, batch in enumerate(batches, start=1):
        again = loader(tokenizer, source, packing=packing)
        again.load_state_dict(dict(zip(("epoch", "block", "taken"), batch[POSITION].tolist(), strict=True)))
        left = [*trained(again), *trained(again)][: len(batches) - taken]
        assert same(left, batches[taken:])


def test_what_was_read_ahead_is_not_lost(tokenizer, tmp_path):
    """Training took two batches, three were read: the next pass of the trainer begins with the third."""
    found = loader(tokenizer, jsonl(tmp_path / "a.jsonl"))
    batches = list(loader(tokenizer, jsonl(tmp_path / "a.jsonl")))
    iterator = iter(found)
    for _ in range(2):
        assert POSITION not in found.trained(next(iterator))
    next(iterator)
    assert same(list(found), batches[2:])


def test_ranks_share_the_rows(tokenizer, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", 24)
    parts = [documents(loader(tokenizer, source, rank=rank, num_replicas=2, shuffle_buffer=6)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 12
    assert not set(parts[0]) & set(parts[1])
    one = documents(loader(tokenizer, source, shuffle_buffer=6))
    assert [d for pair in zip(*parts, strict=True) for d in pair] == one


def test_documents_of_other_roles_are_left_out(tokenizer, tmp_path):
    source = jsonl(tmp_path / "a.jsonl")
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows(4))))
    found = loader(tokenizer, source, validation=str(tmp_path / "v.jsonl"))
    assert len(documents(found)) == 19
    assert found.stream.counts["repeated"] == 4


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"recovery": "a.json"}, "recovery='a.json' cannot be read with streaming=True"),
        ({"recovery": "builtin", "calibration": "a.jsonl"}, "recovery='builtin' cannot be read with streaming=True"),
        ({}, "requires a recovery source that no other role uses"),
        ({"recovery": "a.jsonl", "validation": "./a.jsonl"}, "no other role uses"),
        ({"recovery": "a.jsonl", "shuffle_buffer": 0}, "shuffle_buffer=0 must be positive"),
    ],
)
def test_streams_that_cannot_be(tmp_path, monkeypatch, kwargs, match):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match=match):
        TextDataModule(streaming=True, **kwargs)


@pytest.mark.filterwarnings("ignore:.*examples left out or changed")
def test_a_stream_without_an_example(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(ConfigError, match=r"gives no example: 2 empty\.$"):
        list(loader(tokenizer, str(tmp_path / "a.jsonl")))
    (tmp_path / "b.jsonl").write_text('{"q": "x"}\n')
    with pytest.raises(ConfigError, match="'.*b.jsonl' has no column 'text'"):
        list(loader(tokenizer, str(tmp_path / "b.jsonl")))


def test_what_is_left_out_is_said_and_counted_once(tokenizer, tmp_path):
    """In the first pass alone, however often rows are read, and after a resume."""
    text = [json.dumps({"text": "" if n % 2 else row["text"]}) for n, row in enumerate(rows(20))]
    (tmp_path / "a.jsonl").write_text("\n".join(text))
    found = loader(tokenizer, str(tmp_path / "a.jsonl"))
    with pytest.warns(UserWarning, match=r"\(rows 1 to 5\): examples left out or changed: 2 \(empty\)"):
        first = list(trained(found))
    assert found.stream.counts == {"empty": 10}
    list(trained(found))
    assert found.stream.counts == {"empty": 10}
    again = loader(tokenizer, str(tmp_path / "a.jsonl"))
    again.load_state_dict(found.state_dict())
    list(trained(again))
    assert again.stream.counts == {"empty": 10}
    assert len(first) == 4


def test_what_cannot_be_read_is_named(tokenizer, tmp_path):
    """Also where it lies deep in the file."""
    good = "\n".join(map(json.dumps, rows(12))).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b'\n{"text": "\xff"}\n{"text\n')
    found = loader(tokenizer, str(tmp_path / "a.jsonl"))
    with pytest.warns(UserWarning, match=r"\(rows 11 to 15\).*: 1 \(not UTF-8\), 1 \(not JSON\)"):
        assert len(documents(found)) == 12
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(good)[:-20])
    with pytest.raises(ConfigError, match=r"b\.jsonl\.gz' cannot be read"):
        list(loader(tokenizer, str(tmp_path / "b.jsonl.gz")))
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat))
    with pytest.raises(ConfigError, match="requires a chat template, and the tokenizer has none"):
        list(loader(tokenizer, str(tmp_path / "c.jsonl")))


def fit(folder, source, *, max_steps=7, ckpt_path=None, stop=None, packing=True, **kwargs):
    """Prunes and recovers from a stream; returns the trained weights."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    seed_everything(3, verbose=False)
    data = TextDataModule(recovery=source, streaming=True, shuffle_buffer=5, batch_size=1, packing=packing, seq_len=24,
                          calibration_sequences=2, validation_sequences=2, eval_windows=0, **kwargs)  # fmt: skip
    module = PruningModule(str(folder / "model"), learning_rate=1e-2)
    importance = TaylorImportanceCallback(pruning_ratio=0.1, recovery=LoraRecovery(rank=2, alpha=4, dropout=0.1))
    saved = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = PruneTrainer(
        callbacks=[importance, saved], max_epochs=3, max_steps=max_steps, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_train_batches=stop or 1.0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_resumes_in_a_stream(tmp_path):
    """Seven steps at once, or resumed after the third from its checkpoint: the same weights to the last bit."""
    save_tiny(tmp_path / "model")
    source = jsonl(tmp_path / "a.jsonl", 17)
    whole = fit(tmp_path, source)
    again = fit(tmp_path, source, ckpt_path=str(tmp_path / "checkpoints" / "step=3.ckpt"))
    assert all(tensor.equal(again[name]) for name, tensor in whole.items())


def test_a_stream_must_end_somewhere(tmp_path):
    save_tiny(tmp_path / "model")
    source = jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="length of a stream is not known"):
        fit(tmp_path, source, max_steps=-1)
    with pytest.raises(ConfigError, match="num_workers=1 must be 0"):
        fit(tmp_path, source, num_workers=1)
    with pytest.raises(ConfigError, match="recovery_sequences=.* cannot be used with streaming=True. Set max_steps"):
        fit(tmp_path, source, recovery_sequences=5)


def test_an_empty_file_is_said(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match="gives no example: it has no rows"):
        list(loader(tokenizer, str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("name", ["c4-train.00000-of-00001.json.gz", "a.csv", "shards", "shards/*.jsonl.gz"])
def test_sources_of_every_kind_are_streamed(tokenizer, tmp_path, name):
    if name == "a.csv":
        (tmp_path / name).write_text("text\n" + "".join(row["text"] + "\n" for row in rows(23)))
    elif name.startswith("shards"):
        (tmp_path / "shards").mkdir()
        for shard, part in enumerate((rows(23)[:9], rows(23)[9:])):
            data = "\n".join(map(json.dumps, part)).encode()
            (tmp_path / f"shards/{shard}.jsonl.gz").write_bytes(gzip.compress(data))
    else:
        jsonl(tmp_path / name)
    source = str(tmp_path / name)
    found = loader(tokenizer, source)
    batches = list(trained(found))
    assert same(batches, list(loader(tokenizer, jsonl(tmp_path / "same.jsonl"))))
    for taken, batch in enumerate(batches, start=1):
        again = loader(tokenizer, source)
        again.load_state_dict(dict(zip(("epoch", "block", "taken"), batch[POSITION].tolist(), strict=True)))
        assert same(list(again)[: len(batches) - taken], batches[taken:])
