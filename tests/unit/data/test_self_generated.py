"""Text that the model writes: the same for one key, from its own distribution, without any data, through the trainer."""

import json

import pytest
import torch

from hfprune import PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.cli import main
from hfprune.data.encode import tokenizer_key
from hfprune.data.self_generated import Author, SelfText, Writer, draw, files_key, write
from hfprune.utils.errors import ConfigError
from tests.helpers.models import NAMES, save_tiny, tiny, tiny_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt"])
@torch.no_grad()
def test_what_is_written_is_drawn_from_whole_forward_passes(name):
    """Without a cache, token by token: every drawn token follows from the logits of the sequence before it."""
    assert name in NAMES
    model, settings = tiny(name), SelfText(temperature=0.8, top_p=0.9)
    found = write(model, [1, 5], [3, 4], 14, known=50, settings=settings)
    for row, seed in enumerate((3, 4)):
        generator, ids = torch.Generator().manual_seed(seed), [1, 5]
        while len(ids) < 14:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :50]
            ids.append(int(slow_draw(logits, generator, 0.8, 0.9)))
        assert found[row].tolist() == ids
    assert found.max() < 50


def slow_draw(logits, generator, temperature, top_p):
    """Keeps tokens by probability until ``top_p`` is there, then walks over them by id until the number is used up."""
    weights = [float((logits[i].double() / temperature - logits.max().double() / temperature).exp()) for i in range(50)]
    total = sum(weights)
    order = sorted(range(50), key=lambda i: (-weights[i], i))
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    point = float(torch.rand(1, generator=generator, dtype=torch.float64)) * mass
    for i in sorted(kept):
        point -= weights[i]
        if point < 0:
            return i
    return max(kept)


def test_drawn_tokens_have_the_distribution_of_the_model():
    logits = torch.tensor([[0.0, 2.0, 1.0, -50.0], [1.0, -1.0, 0.5, 3.0]], dtype=torch.float64)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    drawn = torch.stack([draw(logits, generators, SelfText()) for _ in range(4000)])
    counts = torch.stack([torch.bincount(column, minlength=4) for column in drawn.T])
    assert (counts / 4000 - logits.softmax(-1)).abs().max() < 0.02
    likely = torch.stack([draw(logits, generators, SelfText(top_p=0.6)) for _ in range(200)])
    assert likely.unique(dim=0).tolist() == [[1, 3]]


def test_a_draw_hardly_depends_on_rounding():
    """Two tokens as likely as each other: which of them is rounded up decides nothing."""
    base = torch.tensor([1.0, 0.0, 1.0, -1.0], dtype=torch.float64)
    other = base + torch.tensor([0.0, 0.0, 1e-9, 0.0], dtype=torch.float64)
    for seed in range(50):
        first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
        found = draw(torch.stack([base, other]), [first, second], SelfText(top_p=0.9))
        assert found[0] == found[1]


def writer(folder, load, *, seed=0, **settings):
    return Writer(
        Author(load=load, key=lambda: "tiny"), tiny_tokenizer(), SelfText(**settings), seed=seed, folder=folder
    )


def test_texts_do_not_depend_on_the_batch_size_beyond_rounding(tmp_path):
    rows = [writer(tmp_path, tiny, batch_size=size).rows("calibration", 7, 20) for size in (1, 3, 16)]
    assert rows[0].equal(rows[1])
    assert rows[0].equal(rows[2])
    assert len(rows[0].unique(dim=0)) == 7
    assert not rows[0].equal(writer(tmp_path, tiny).rows("recovery", 7, 20))
    assert not rows[0].equal(writer(tmp_path, tiny, seed=1).rows("calibration", 7, 20))
    assert len(list(tmp_path.iterdir())) == 5


def test_an_interrupted_text_goes_on(tmp_path):
    whole = writer(tmp_path / "one", tiny, batch_size=2).rows("calibration", 7, 12)
    calls = []

    class Killed(Exception):
        pass

    def fragile():
        model = tiny()
        forward = model.forward

        def count(*args, **kwargs):
            calls.append(1)
            if len(calls) == 30:
                raise Killed
            return forward(*args, **kwargs)

        model.forward = count
        return model

    with pytest.raises(Killed):
        writer(tmp_path / "two", fragile, batch_size=2).rows("calibration", 7, 12)
    assert writer(tmp_path / "two", fragile, batch_size=2).rows("calibration", 7, 12).equal(whole)
    assert len(calls) == 30 + 2 * 11  # of four batches, two were there
    assert writer(tmp_path / "two", None, batch_size=2).rows("calibration", 7, 12).equal(whole)
    assert [path.suffix for path in (tmp_path / "two").iterdir()] == [".safetensors"]


def test_another_model_writes_anew(tmp_path):
    folders = [save_tiny(tmp_path / str(seed), seed=seed) for seed in (0, 0, 1)]
    keys = [files_key(folder) for folder in (folders[0], folders[0], folders[2])]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"temperature": 0}, "temperature=0 must be positive"), ({"top_p": 0}, "top_p=0 must be in"),
     ({"top_p": 1.5}, "top_p=1.5 must"), ({"batch_size": 0}, "batch_size=0 must")],
)  # fmt: skip
def test_settings_are_checked(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        SelfText(**kwargs)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="text='self' is not allowed"):
        TextDataModule(text="self")
    data = TextDataModule("self", seq_len=16)
    data.bind(tiny_tokenizer(), vocab_size=61, max_positions=64)
    with pytest.raises(ConfigError, match="pass author to bind"):
        data.calibration_dataloader()
    with pytest.raises(ConfigError, match="recovery='self' needs recovery_sequences"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match="start has 20 tokens"):
        writer(tmp_path, tiny, start="a " * 20).rows("calibration", 1, 20)
    assert data.evaluation_windows() is None


def run(folder, recovery=0):
    data = TextDataModule("self", seq_len=16, calibration_sequences=4, recovery_sequences=recovery or None,
                          validation_sequences=2, batch_size=2)  # fmt: skip
    importance = TaylorImportanceCallback(pruning_ratio=0.2, recovery="full")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    trainer = PruneTrainer(callbacks=[importance], max_epochs=1, enable_checkpointing=False, **quiet)
    module = PruningModule(str(folder))
    trainer.fit(module, datamodule=data) if recovery else trainer.prune(module, datamodule=data)
    return module, data


def test_prunes_and_recovers_without_any_data(tmp_path):
    folder = save_tiny(tmp_path / "model")
    state = torch.get_rng_state()
    module, data = run(folder)
    told = data.summary()["calibration"]
    assert (told["source"], told["kind"], told["sequences"], told["tokens"]) == ("self", "tokens", 4, 64)
    assert told["self_text"] == {"temperature": 1.0, "top_p": 1.0, "batch_size": 16, "start": None}
    (file,) = (tmp_path / "cache" / "written").iterdir()
    torch.set_rng_state(state)
    again, later = run(folder)
    assert later.summary()["calibration"]["sha256"] == told["sha256"]
    assert again.plan.keep == module.plan.keep
    _, recovered = run(folder, recovery=6)
    found = recovered.summary()
    assert found["recovery"]["sequences"] == 6
    assert len({found[role]["sha256"] for role in ("calibration", "recovery", "validation")}) == 3
    rows = data.calibration_dataloader().dataset
    assert all(int(row["input_ids"][0]) == tiny_tokenizer().bos_token_id for row in rows)
    assert file.exists()


def test_written_text_can_be_given_as_tokens(tmp_path):
    """The file says whose tokens it holds."""
    writer(tmp_path, tiny).rows("calibration", 5, 16)
    (file,) = tmp_path.iterdir()
    data = TextDataModule(str(file), seq_len=16, calibration_sequences=5, eval_windows=0)
    tokenizer = tiny_tokenizer()
    data.bind(tokenizer, vocab_size=61, max_positions=64)
    assert len(data.calibration_dataloader().dataset) == 5
    assert data._roles.rows("calibration").tokenizer == tokenizer_key(tokenizer)


def test_command_line_without_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [
        f"--model.path={save_tiny(tmp_path / 'model')}",
        "--pruning_ratio=0.2",
        "--output_dir=out",
        "--latency=false",
    ]
    flags += [
        "--data.calibration=self",
        "--data.self_text.temperature=0.7",
        "--data.self_text.start=the",
        "--data.seq_len=16",
    ]
    flags += ["--data.calibration_sequences=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["prune", *flags]) == 0
    told = json.loads((tmp_path / "out" / "report.json").read_text())["data"]["calibration"]
    assert told["self_text"] == {"temperature": 0.7, "top_p": 1.0, "batch_size": 16, "start": "the"}


def test_how_much_recovery_text_is_asked_before_any_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dense = save_tiny(tmp_path / "dense")
    monkeypatch.setattr(Writer, "rows", lambda *_: pytest.fail("text was written"))
    flags = [f"--model.path={dense}", "--data.calibration=self", "--data.seq_len=16", "--pruning_ratio=0.2"]
    assert main(["fit", *flags, "--data.eval_windows=0", "--output_dir=out"]) == 2
    assert "needs recovery_sequences, the number of sequences to write" in capsys.readouterr().err
