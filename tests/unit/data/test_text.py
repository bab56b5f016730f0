"""Roles never overlap, tokens are what they should be, and mistakes are said before they cost."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hfprune.data import TextDataModule, load_rows
from hfprune.data.encode import concat_blocks, crop_documents, prompt_of
from hfprune.data.examples import encode_instruction
from hfprune.data.formats import InstructionRow
from hfprune.data.roles import assign_documents, unique_documents
from hfprune.data.text import warn_of_overlap
from hfprune.evaluation.overlap import Sketch
from hfprune.utils.errors import ConfigError
from tests.helpers.models import tiny_tokenizer, token_ids


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def bound(tokenizer, **kwargs):
    defaults = {
        "seq_len": 16,
        "calibration_sequences": 4,
        "recovery_sequences": 8,
        "eval_window": 16,
        "eval_windows": 3,
    }
    data = TextDataModule(**defaults | kwargs)
    data.bind(tokenizer, vocab_size=61, max_positions=64)
    return data


def lines(path, count, prefix="document"):
    rows = [{"text": f"{prefix} number {n} is about the {n % 7} and the {n} of them " * 4} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@given(
    total=st.integers(0, 200),
    shares=st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 5), min_size=1),
    seed=st.integers(0, 5),
)
def test_assignment_is_a_partition_that_ignores_order(total, shares, seed):
    parts = assign_documents(total, shares, seed=seed)
    assert sorted(n for part in parts.values() for n in part) == list(range(total))
    assert parts == assign_documents(total, dict(reversed(shares.items())), seed=seed)


def test_seed_zero_is_a_seed():
    zero = assign_documents(50, {"a": 1, "b": 1}, seed=0)
    assert zero == assign_documents(50, {"a": 1, "b": 1}, seed=0)
    assert zero != assign_documents(50, {"a": 1, "b": 1}, seed=1)


def test_repeated_documents_count_once():
    seen = set()
    assert unique_documents(["x", "y", "x"], seen=seen) == [0, 1]
    assert unique_documents(["y", "z"], seen=seen) == [1]


def all_documents(data):
    return {role: set(data._roles.documents(role)) for role in data._sources}


def test_roles_of_one_source_share_no_document(tokenizer, tmp_path):
    data = bound(tokenizer, calibration=lines(tmp_path / "a.jsonl", 60))
    documents = all_documents(data)
    assert set(documents) == {"calibration", "recovery", "validation", "evaluation"}
    assert sum(map(len, documents.values())) == 60 == len(set().union(*documents.values()))
    assert all(documents.values())


def test_roles_of_two_sources_share_no_document(tokenizer, tmp_path):
    """The recovery source repeats all of the calibration source: what calibration or evaluation use is left out there."""
    calibration = lines(tmp_path / "a.jsonl", 30)
    both = (tmp_path / "a.jsonl").read_text() + "\n"
    lines(tmp_path / "b.jsonl", 30, "other")
    (tmp_path / "b.jsonl").write_text(both + (tmp_path / "b.jsonl").read_text())
    data = bound(tokenizer, calibration=calibration, recovery=str(tmp_path / "b.jsonl"))
    documents = all_documents(data)
    assert sum(map(len, documents.values())) == len(set().union(*documents.values()))
    assert not any("document" in d for d in documents["recovery"] | documents["validation"])
    data.train_dataloader()
    assert data.summary()["recovery"]["dropped"]["repeated"] > 0


@pytest.mark.parametrize("packing", [False, True])
def test_a_copy_of_the_calibration_file_says_that_it_is_one(tokenizer, tmp_path, packing):
    """Its documents serve calibration; the error names the reason, not a lack of text."""
    calibration, copy = lines(tmp_path / "a.jsonl", 30), lines(tmp_path / "b.jsonl", 30)
    data = bound(tokenizer, calibration=calibration, recovery=copy, validation="builtin", packing=packing)
    with pytest.raises(ConfigError, match="30 .*also in the data of another role"):
        data.train_dataloader()
    other = lines(tmp_path / "b.jsonl", 30, prefix="another")
    data = bound(tokenizer, calibration=calibration, recovery=other, validation="builtin", packing=packing)
    assert len(data.train_dataloader().dataset)


def test_calibration_does_not_depend_on_whether_recovery_is_used(tokenizer):
    alone, after = bound(tokenizer), bound(tokenizer)
    after.train_dataloader()
    assert torch.equal(alone._calibration_ids(), after._calibration_ids())


def test_seed_orders_a_source_that_serves_calibration_alone(tokenizer, tmp_path):
    other = {"recovery": lines(tmp_path / "r.jsonl", 5, "other"), "eval_windows": 0}
    calibration = lines(tmp_path / "a.jsonl", 40)
    ids = {s: bound(tokenizer, calibration=calibration, seed=s, **other)._calibration_ids() for s in (0, 1)}
    assert not torch.equal(ids[0], ids[1])


def test_seeds_change_the_calibration_set(tokenizer):
    ids = {seed: bound(tokenizer, seed=seed)._calibration_ids() for seed in (0, 1)}
    assert not torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0], bound(tokenizer, seed=0)._calibration_ids())


def test_blocks_are_documents_joined_with_eos(tokenizer):
    texts = ["the assert", "is a", "statement of the while"]
    stream = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    blocks = concat_blocks(texts, tokenizer, seq_len=5, max_blocks=None)
    assert blocks.flatten().tolist() == stream[: len(stream) // 5 * 5]
    assert concat_blocks(texts, tokenizer, seq_len=5, max_blocks=1).tolist() == [stream[:5]]


def test_crops_come_from_long_documents_only_and_repeat(tokenizer):
    texts = ["short", "the while statement is used for repeated execution " * 3, "an assert statement " * 8]
    crops = crop_documents(texts, tokenizer, seq_len=20, max_sequences=None, seed=0)
    assert len(crops) == 2
    for crop, text in zip(crops.tolist(), texts[1:], strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert any(ids[s : s + 20] == crop for s in range(len(ids)))
    assert torch.equal(crops, crop_documents(texts, tokenizer, seq_len=20, max_sequences=None, seed=0))
    starts = {tuple(crop_documents(texts[1:2], tokenizer, seq_len=20, max_sequences=None, seed=s)[0].tolist())
              for s in range(9)}  # fmt: skip
    assert len(starts) > 1
    with pytest.raises(ConfigError, match="none of the 1 documents has 500 tokens .the longest has"):
        crop_documents(texts[:1], tokenizer, seq_len=500, max_sequences=None, seed=0)


@pytest.mark.parametrize("given_input", ["", "some input"])
def test_instruction_labels_mask_exactly_the_prompt_and_keep_eos(tokenizer, given_input):
    row = InstructionRow(instruction="the while", input=given_input, output="is a statement")
    ids, labels = encode_instruction(row, tokenizer)
    prompt = tokenizer(prompt_of(row), add_special_tokens=False)["input_ids"]
    response = tokenizer("is a statement", add_special_tokens=False)["input_ids"]
    assert ids == prompt + response + [tokenizer.eos_token_id]
    assert labels == [-100] * len(prompt) + response + [tokenizer.eos_token_id]
    assert ("### Input:" in prompt_of(row)) == bool(given_input)


def alpaca(path, outputs):
    path.write_text(json.dumps([{"instruction": "the", "input": "", "output": o} for o in outputs]))
    return str(path)


def test_too_long_examples_are_left_out_and_counted(tokenizer, tmp_path):
    source = alpaca(tmp_path / "a.json", ["is a", "is " * 500, "an of"])
    data = bound(tokenizer, recovery=source, validation="builtin", seq_len=400, overlong="drop")
    data.bind(tokenizer, vocab_size=61, max_positions=400)
    with pytest.warns(UserWarning, match=r"left out or changed: 1 .longer than seq_len.; seq_len=400"):
        batches = list(data.train_dataloader())
    (batch,) = batches
    assert batch["input_ids"].shape[0] == 2
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert labels[length - 1] == ids[length - 1] == tokenizer.eos_token_id
        assert (labels[length:] == -100).all()
        assert (ids[length:] == tokenizer.pad_token_id).all()
    assert data.summary()["recovery"]["dropped"] == {"longer than seq_len": 1}


def test_no_example_fits(tokenizer, tmp_path):
    data = bound(tokenizer, recovery=alpaca(tmp_path / "a.json", ["is " * 500]), validation="builtin", seq_len=20,
                 overlong="cut")  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"recovery=.*: no example fits into seq_len=20 tokens .1 no supervised token"
    ):
        data.train_dataloader()


def test_evaluation_text_is_tokenised_once_as_a_whole(tokenizer, tmp_path):
    text = "the assert statement\n\nis a convenient way\n\n" * 20
    (tmp_path / "w.txt").write_text(text)
    data = bound(tokenizer, text=str(tmp_path / "w.txt"), eval_windows=None)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert data.evaluation_windows().ids.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert bound(tokenizer, text=str(tmp_path / "w.txt")).evaluation_windows().ids.shape == (3, 16)
    assert bound(tokenizer, eval_windows=0).evaluation_windows() is None


def test_wikitext_windows(shared_dir, tokenizer):
    """The shared file is read in text mode: its CRLF line ends become LF."""
    rows = load_rows(str(shared_dir / "data/wikitext2_test_raw.txt"))
    assert len(rows.running.encode()) == 1_296_370


def test_evaluation_text_too_short(tokenizer, tmp_path):
    (tmp_path / "w.txt").write_text("hi")
    with pytest.raises(ConfigError, match="fewer than one window .eval_window=16.*smaller eval_window"):
        bound(tokenizer, text=str(tmp_path / "w.txt")).evaluation_windows()
    (tmp_path / "a.json").write_text(json.dumps(["the assert", "is a", "of", "while"]))
    with pytest.warns(UserWarning, match="perplexity and fidelity are not measured"):
        assert bound(tokenizer, calibration=str(tmp_path / "a.json"), eval_window=64).evaluation_windows() is None


def test_evaluation_windows_with_stride_and_bos(tokenizer, tmp_path):
    (tmp_path / "w.txt").write_text("the assert is a statement of the language and so is while\n" * 20)
    plain = bound(tokenizer, text=str(tmp_path / "w.txt"), eval_windows=None).evaluation_windows()
    strided = bound(tokenizer, text=str(tmp_path / "w.txt"), eval_windows=None, eval_stride=4).evaluation_windows()
    assert torch.equal(strided.ids[::4], plain.ids)
    assert strided.source == str(tmp_path / "w.txt")
    tokenizer.bos_token = "<s>" if tokenizer.bos_token is None else tokenizer.bos_token
    with_bos = bound(tokenizer, text=str(tmp_path / "w.txt"), bos="always").evaluation_windows()
    assert (with_bos.ids[:, 0] == tokenizer.bos_token_id).all()
    assert with_bos.ids.flatten()[1:16].tolist() == plain.ids.flatten()[:15].tolist()
    with pytest.raises(ConfigError, match="eval_stride=17 must be between 1 and 16"):
        bound(tokenizer, eval_stride=17)
    with pytest.raises(ConfigError, match="eval_stride=16 must be between 1 and 15"):
        bound(tokenizer, eval_stride=16, bos="always").evaluation_windows()
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="no BOS token"):
        bound(tokenizer, bos="always")


def test_fewer_calibration_sequences_than_asked_is_said_with_both_numbers(tokenizer, tmp_path):
    data = bound(tokenizer, calibration=lines(tmp_path / "a.jsonl", 12), calibration_sequences=9999)
    with pytest.warns(UserWarning, match=r"gives \d+ sequences, not 9999"):
        data.calibration_dataloader()


def test_pretokenised_rows_serve_calibration_alone(tokenizer, tmp_path):
    save_file({"input_ids": token_ids(6, 10)}, tmp_path / "t.safetensors")
    data = bound(tokenizer, calibration=str(tmp_path / "t.safetensors"), calibration_sequences=6)
    batches = list(data.calibration_dataloader())
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), token_ids(6, 10))
    assert data.evaluation_windows() is None
    with pytest.raises(ConfigError, match="recovery must be given"):
        data.train_dataloader()


def rows_of(loader):
    return {tuple(row) for batch in loader for row in batch["input_ids"].tolist()}


def test_pretokenised_rows_that_repeat_serve_one_role(tokenizer, tmp_path):
    ids = token_ids(20, 10)
    save_file({"input_ids": torch.cat([ids, ids, ids])}, tmp_path / "t.safetensors")
    data = bound(tokenizer, recovery=str(tmp_path / "t.safetensors"), recovery_sequences=None)
    recovery, validation = rows_of(data.train_dataloader()), rows_of(data.val_dataloader())
    assert recovery
    assert validation
    assert not recovery & validation
    assert recovery | validation == set(map(tuple, ids.tolist()))
    assert sum(found["dropped"]["repeated"] for found in data.summary().values()) == 40


def test_too_few_pretokenised_rows_to_share(tokenizer, tmp_path):
    save_file({"input_ids": token_ids(3, 10)}, tmp_path / "t.safetensors")
    data = bound(tokenizer, recovery=str(tmp_path / "t.safetensors"))
    with pytest.raises(
        ConfigError, match="validation must be given: .* holds 3 sequences, too few .* left for validation"
    ):
        data.val_dataloader()


def test_repeats_within_a_shared_source_are_counted(tokenizer, tmp_path):
    source = lines(tmp_path / "a.jsonl", 60)
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(f"{text}\n{text}")
    data = bound(tokenizer, calibration=source)
    documents = all_documents(data)
    assert sum(map(len, documents.values())) == 60
    assert data._roles.duplicates == {role: len(found) for role, found in documents.items()}


def test_one_file_named_in_two_ways_is_one_source(tokenizer, tmp_path, monkeypatch):
    lines(tmp_path / "a.jsonl", 60)
    monkeypatch.chdir(tmp_path)
    data = bound(tokenizer, calibration="a.jsonl", recovery="./a.jsonl", text=str(tmp_path / "a.jsonl"))
    documents = all_documents(data)
    assert all(documents.values())
    assert sum(map(len, documents.values())) == 60 == len(set().union(*documents.values()))


@pytest.mark.parametrize("bad", [-1, 61])
def test_ids_of_another_tokenizer(tokenizer, tmp_path, bad):
    ids = token_ids(2, 10)
    ids[1, 4] = bad
    save_file({"input_ids": ids}, tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=f"contains token id {bad}, but the model has ids 0 to 60"):
        bound(tokenizer, calibration=str(tmp_path / "t.safetensors")).calibration_dataloader()


def test_tokenizer_larger_than_the_model(tokenizer):
    with pytest.raises(ConfigError, match="61 tokens, but the model has 50 embeddings"):
        TextDataModule().bind(tokenizer, vocab_size=50, max_positions=None)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"seq_len": 1}, "seq_len=1 must"),
        ({"batch_size": 0}, "batch_size=0 must"),
        ({"calibration_sequences": -3}, "calibration_sequences=-3 must"),
        ({"eval_windows": -1}, "eval_windows=-1 must"),
        ({"recovery_sequences": 0}, "recovery_sequences=0 must"),
        ({"calibration_layout": "crops"}, "must be 'concat' or 'crop'"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative"),
        ({"seed": -1}, "seed=-1 must be between"),
        ({"seed": 2**32}, "seed=4294967296 must be between"),
        ({"text": "nowhere.txt"}, "text='nowhere.txt' does not exist"),
        ({"recovery": "./nowhere"}, "recovery='./nowhere' does not exist"),
    ],
)
def test_arguments_are_checked_at_once(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        TextDataModule(**kwargs)


def test_windows_longer_than_the_model_allows(tokenizer):
    with pytest.raises(ConfigError, match="eval_window: 65 tokens exceed the model's maximum of 64"):
        bound(tokenizer, eval_window=65).evaluation_windows()
    with pytest.raises(ConfigError, match="seq_len: 65 tokens"):
        bound(tokenizer, seq_len=65).calibration_dataloader()


def test_summary_tells_where_every_token_came_from(tokenizer):
    data = bound(tokenizer)
    data.calibration_dataloader()
    data.train_dataloader()
    summary = data.summary()
    texts = load_rows("builtin").texts  # some topics of Python's documentation stand there twice
    repeated = sum(texts.count(document) - 1 for document in data._roles.documents("calibration"))
    sketch = Sketch.from_text(summary["calibration"].pop("ngrams"))
    ids = [row["input_ids"].tolist() for row in data.calibration_dataloader().dataset]
    assert (sketch.share_of(ids), sketch.complete) == (1.0, True)
    assert summary["calibration"] | {"sha256": ""} == {
        "source": "builtin", "kind": "text", "sequences": 4, "tokens": 64, "supervised_tokens": None, "sha256": "",
        "dropped": {"repeated": repeated} if repeated else {}, "bos": "no BOS added",
    }  # fmt: skip
    assert summary["recovery"]["supervised_tokens"] == 8 * 16
    assert len(summary["recovery"]["sha256"]) == 64
    assert summary["recovery"]["sha256"] != summary["calibration"]["sha256"]


def test_the_digest_tells_where_sequences_end(tokenizer):
    """The same tokens cut into other sequences give other scores; nothing made of one may serve the other."""
    made = [bound(tokenizer, seq_len=size, calibration_sequences=64 // size) for size in (16, 32)]
    for data in made:
        data.calibration_dataloader()
    one, other = (data.summary()["calibration"] for data in made)
    assert one["tokens"] == other["tokens"] == 64
    assert one["sha256"] != other["sha256"]


def test_evaluation_text_that_calibrates_too_is_said(tokenizer, tmp_path):
    """The same text under another name, in another layout: documents are not equal, their words are."""
    words = "the assert statement is a part of the language and so is while and for in it " * 30
    (tmp_path / "eval.txt").write_text(words)
    (tmp_path / "calibration.json").write_text(json.dumps([words[:900] + "x", words[100:] + "y"]))
    data = bound(tokenizer, calibration=str(tmp_path / "calibration.json"), text=str(tmp_path / "eval.txt"))
    data.calibration_dataloader()
    assert data.overlap()["calibration"] > 0.5
    with pytest.warns(UserWarning, match="% of the 13-grams of the evaluation text occur in the calibration text"):
        warn_of_overlap(data.overlap())
    other = bound(tokenizer, text=str(tmp_path / "eval.txt"))
    other.calibration_dataloader()
    assert other.overlap() == {"calibration": 0.0}
    assert bound(tokenizer, eval_windows=0).overlap() == {}


def test_data_without_a_tokenizer_is_an_error():
    with pytest.raises(ConfigError, match="bind"):
        TextDataModule().calibration_dataloader()


@pytest.mark.parametrize("given", [{}, {"text": "builtin"}])
def test_without_training_calibration_has_the_documents_of_recovery_and_validation(tokenizer, tmp_path, given):
    source = lines(tmp_path / "a.jsonl", 60)
    whole = bound(tokenizer, calibration=source, **given)
    pruned = bound(tokenizer, calibration=source, **given)
    pruned.serve(training=False)
    trained, idle = (data._roles.documents for data in (whole, pruned))
    assert idle("calibration")[: len(trained("calibration"))] == trained("calibration")  # behind its own
    lent = set(trained("recovery")) | set(trained("validation"))
    assert set(idle("calibration")) == set(trained("calibration")) | lent
    assert idle("evaluation") == trained("evaluation")
    assert not set(idle("evaluation")) & set(idle("calibration"))


def test_calibration_sequences_stay_the_same_where_documents_are_enough(tokenizer, tmp_path):
    source = lines(tmp_path / "a.jsonl", 60)
    found = []
    for layout in ("concat", "crop"):
        for training in (True, False):
            data = bound(tokenizer, calibration=source, calibration_layout=layout, calibration_sequences=12)
            data.serve(training=training)
            found.append([row["input_ids"].tolist() for row in data.calibration_dataloader().dataset])
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_every_document_of_a_file_calibrates_where_nothing_trains(tokenizer, tmp_path):
    data = bound(tokenizer, calibration=lines(tmp_path / "a.jsonl", 24), text="builtin", calibration_sequences=24,
                 calibration_layout="crop")  # fmt: skip
    data.serve(training=False)
    assert len(data.calibration_dataloader().dataset) == 24


def test_data_that_pruned_may_train_afterwards(tokenizer, tmp_path):
    data = bound(tokenizer, calibration=lines(tmp_path / "a.jsonl", 60), calibration_sequences=30)
    data.serve(training=False)
    assert len(data.calibration_dataloader().dataset) == 30
    data.serve(training=True)
    fresh = bound(tokenizer, calibration=lines(tmp_path / "a.jsonl", 60), calibration_sequences=30)
    assert len(data.calibration_dataloader().dataset) == len(fresh.calibration_dataloader().dataset)
    assert list(data.train_dataloader().dataset) == list(fresh.train_dataloader().dataset)
    documents = all_documents(data)
    assert sum(map(len, documents.values())) == 60 == len(set().union(*documents.values()))
