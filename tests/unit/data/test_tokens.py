"""Tokens are those that the model reads when it serves: BOS, whole texts, chat templates; for several kinds of tokenizer."""

import itertools
import json
from collections import Counter

import pytest
import torch

from hfprune.data import ChatRow, InstructionRow, TextDataModule, Turn
from hfprune.data.chat_template import ChatEncoder, ChatError
from hfprune.data.encode import WholeText, adds_bos, concat_blocks, crop_documents, prompt_of
from hfprune.data.examples import BY_TURNS, Encoder, ExampleOptions
from hfprune.io.load import predicts_badly_without_bos
from hfprune.modules import PruningModule
from hfprune.trainer import PruneTrainer
from hfprune.utils.errors import ConfigError
from tests.helpers.models import NAMES, STYLES, configs, save_tiny, styled_tokenizer, tiny_tokenizer

BOS, EOS = 1, 2
OUTPUTS = [
    "The assert",
    " leading space",
    "\nnew line",
    "\n\n\nmany",
    "é ünïcode 東京",
    "the",
    "▁odd </s> words",
    "a  b ",
]


@pytest.fixture(scope="module", params=STYLES)
def styled(request):
    return styled_tokenizer(request.param)


class Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def __call__(self, *args, **kwargs):
        assert "return_offsets_mapping" not in kwargs
        return self._tokenizer(*args, **kwargs)


def encoder(tokenizer, *, seq_len=1000, **options):
    return Encoder(tokenizer, ExampleOptions(seq_len=seq_len, **options), Counter())


def test_habits(styled):
    assert adds_bos(styled)
    assert adds_bos(Slow(styled))
    assert not adds_bos(tiny_tokenizer())
    nameless = styled_tokenizer("llama2")
    nameless.bos_token = None
    assert not adds_bos(nameless)


@pytest.mark.parametrize("output", OUTPUTS)
def test_instructions_are_tokenised_as_one_text(styled, output):
    row = InstructionRow(instruction="the while", input="", output=output)
    ((ids, labels),) = encoder(styled)(row)
    prompt = prompt_of(row)
    assert ids == [*styled(prompt + output)["input_ids"], EOS]
    first = next(i for i, label in enumerate(labels) if label != -100)
    assert labels == [-100] * first + ids[first:]
    # the masked tokens say no more than the prompt; with the first supervised one, they say more
    assert prompt.startswith(text_of(styled, ids[1:first]))
    assert not prompt.startswith(text_of(styled, ids[1 : first + 1])) or styled.decode(ids[first]) == "�"
    assert encoder(Slow(styled))(row) == [(ids, labels)]


def text_of(tokenizer, ids):
    """Returns what the tokens say, without what a dummy prefix puts before it."""
    return tokenizer.decode(ids, skip_special_tokens=False).removeprefix(" ")


def test_no_dummy_prefix_before_a_response():
    """The first token that is learnt is the response's own first token, not a space of its own."""
    for style in STYLES:
        tokenizer = styled_tokenizer(style)
        ((_, labels),) = encoder(tokenizer)(InstructionRow(instruction="the", input="", output="The assert"))
        assert tokenizer.convert_ids_to_tokens([label for label in labels if label != -100][:1]) == ["The"]


def test_a_token_that_spans_the_border_belongs_to_the_response():
    tokenizer = styled_tokenizer("gemma")
    row = InstructionRow(instruction="the", input="", output="\nnew")
    ((_, labels),) = encoder(tokenizer)(row)
    learnt = [label for label in labels if label != -100]
    assert tokenizer.decode(learnt[:1]) == "\n\n"


CHAT = ChatRow(
    (
        Turn("user", "the while"),
        Turn("assistant", "The assert"),
        Turn("user", "and é"),
        Turn("assistant", "is 東 so"),
    )
)


def messages(row):
    return [{"role": turn.speaker, "content": turn.text} for turn in row.turns]


def test_chats_have_the_ids_of_the_chat_template(styled):
    ((ids, labels),) = encoder(styled)(CHAT)
    assert ids == styled.apply_chat_template(messages(CHAT), tokenize=True, return_dict=False)
    assert ids.count(BOS) == (2 if "[INST]" in styled.chat_template else 1)
    end = "<end_of_turn>" if "turn" in styled.chat_template else "</s>"
    learnt = styled.decode([label for label in labels if label != -100]).split(end)
    assert [part.strip() for part in learnt] == ["The assert", "is 東 so", ""]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert encoder(Slow(styled))(CHAT) == [(ids, labels)]


def test_instructions_in_the_chat_template_have_its_ids(styled):
    row = InstructionRow(instruction="the", input="while", output="is a")
    ((ids, _),) = encoder(styled, template="chat")(row)
    chat = [{"role": "user", "content": "the\n\nwhile"}, {"role": "assistant", "content": "is a"}]
    assert ids == styled.apply_chat_template(chat, tokenize=True, return_dict=False)


def test_bos_is_never_doubled_and_always_there_when_asked(styled):
    for setting in ("auto", "always", "never"):
        ((ids, labels),) = encoder(styled, bos=setting)(CHAT)
        assert ids[:2].count(BOS) == 1  # the template's own
    styled = styled_tokenizer("gemma")
    styled.chat_template = styled.chat_template.replace("{{ bos_token }}", "")
    assert encoder(styled)(CHAT)[0][0][0] != BOS
    ((ids, labels),) = encoder(styled, bos="always")(CHAT)
    assert (ids[0], labels[0]) == (BOS, -100)
    assert encoder(styled, bos="never")("the while")[0][0][0] != BOS


def test_pieces_of_a_long_example_begin_with_bos_and_predict_every_token_once(styled):
    row = InstructionRow(instruction="the", input="", output="is a statement of the language " * 4)
    for document in (row, row.output):
        ((_, labels),) = encoder(styled)(document)
        for size in (3, 4, 9):
            pieces = encoder(styled, seq_len=size)(document)
            assert all(piece[0] == BOS and len(piece) <= size for piece, _ in pieces)
            predicted = [label for _, piece in pieces for label in piece[1:] if label != -100]
            assert predicted == [label for label in labels[1:] if label != -100]
        assert len(encoder(styled, seq_len=2)(document)) > 10  # no room for BOS and context: it ends all the same


# ---- templates -------------------------------------------------------------------------------------------------------

THINKS = (  # empty thoughts before the last answer only
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
OPENS = (  # a generation prompt that opens a thought, which the template drops again
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<A>{{ m['content'].split('</think>')[-1] }}</s>"
    "{% else %}<U>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
COUNTS = "{{ messages|length }} {% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
CLOSES = (  # ends with EOS whatever is last, so every conversation changes when it goes on
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<unk>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
)
MERGES = (  # the system message is put into the last question
    "{% for m in messages %}{% if m['role'] == 'user' %}[{% if loop.index0 + 2 >= messages|length %}"
    "{{ messages[0]['content'] }}: {% endif %}{{ m['content'] }}]{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>"
    "{% endif %}{% endfor %}"
)
DATED = (
    "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (THINKS, ["<think>\n\n</think>\n\nThe assert</s>", "<think>\n\n</think>\n\nis 東 so</s>"]),
        (OPENS, ["The assert</s>is 東 so</s>"]),
        (COUNTS, ["The assert</s>", "is 東 so</s>"]),
        (CLOSES, ["The assert<unk></s>", "is 東 so<unk></s>"]),
        (MERGES, ["The assert</s>", "is 東 so</s>"]),
        (DATED, ["The assert</s>is 東 so</s>"]),
    ],
)
def test_templates_that_write_earlier_turns_otherwise(template, expected):
    tokenizer = styled_tokenizer("llama3")
    tokenizer.chat_template = template
    row = ChatRow((Turn("system", "be"), *CHAT.turns))
    made = encoder(tokenizer)
    examples = made(row)
    assert [tokenizer.decode([t for t in labels if t != -100]) for _, labels in examples] == expected
    assert made._counts[BY_TURNS] == (len(expected) > 1)
    ends = [3, 5] if len(expected) > 1 else [5]
    for end, (ids, labels) in zip(ends, examples, strict=True):
        if template != DATED:
            whole = tokenizer.apply_chat_template(messages(row)[:end], tokenize=True, return_dict=False)
            assert ids == whole
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    assert encoder(tokenizer)(row) == examples  # the same at another time


def test_a_conversation_that_the_assistant_begins():
    tokenizer = styled_tokenizer("gemma")
    ((_, labels),) = encoder(tokenizer)(
        ChatRow((Turn("assistant", "The assert"), Turn("user", "a"), Turn("assistant", "b")))
    )
    learnt = tokenizer.decode([label for label in labels if label != -100])
    assert learnt == "The assert<end_of_turn>b<end_of_turn>"


def test_why_a_conversation_is_left_out():
    tokenizer = styled_tokenizer("gemma")
    made = encoder(tokenizer)
    assert made(ChatRow((Turn("system", "be"), *CHAT.turns))) == []
    assert made._counts == {"refused by the chat template: System role not supported": 1}
    tokenizer.chat_template = "nothing"
    with pytest.raises(ChatError, match="response not found"):
        ChatEncoder(tokenizer)(CHAT)
    tokenizer.chat_template = "{{ raise_exception(messages[0]['content']) }}"
    made = encoder(tokenizer)
    for number in range(30):
        made(ChatRow((Turn("user", f"question {number}"), Turn("assistant", "a"))))
    assert sum(made._counts.values()) == 30
    assert len(made._counts) < 12


@pytest.mark.parametrize("broken", ["{{ 1 / 0 }}", "{{ messages[9]['content'] + 1 }}", "{% for %}", "{{ none.x() }}"])
def test_a_template_that_fails_is_one_reason(broken):
    tokenizer = styled_tokenizer("gemma")
    tokenizer.chat_template = broken
    made = encoder(tokenizer)
    assert made(CHAT) == []
    assert "refused by the chat template" in next(iter(made._counts))


def test_spans_of_a_text(styled):
    """Parts that follow each other share no token, and together they are the whole, where no token spans a border."""
    text = "The assert é\n</s> is a\n\n東 so"
    for tokenizer in (styled, Slow(styled)):
        whole = WholeText(text, tokenizer)
        assert whole.ids == styled(text, add_special_tokens=False)["input_ids"]
        assert whole.span(0, len(text)) == slice(0, len(whole.ids))
        for border in (text.index("</s>"), text.index("東")):
            assert whole.span(0, border).stop == whole.span(border, len(text)).start
        assert whole.span(3, 3) == slice(whole.span(3, 3).start, whole.span(3, 3).start)


# ---- BOS -------------------------------------------------------------------------------------------------------------


def test_blocks_with_bos(styled):
    texts = ["the assert", "is a", "statement of the while é"]
    pieces = [styled(text, add_special_tokens=False)["input_ids"] for text in texts]
    stream = [token for ids in pieces for token in (BOS, *ids, EOS)]
    blocks = concat_blocks(texts, styled, seq_len=7, max_blocks=None, bos=BOS).tolist()
    assert all(block[0] == BOS and len(block) == 7 for block in blocks)
    position = 0
    for block in blocks:  # every token of the stream once, in order
        body = block if stream[position] == BOS else block[1:]
        assert stream[position : position + len(body)] == body
        position += len(body)
    assert len(stream) - position < 7
    assert concat_blocks(texts, styled, seq_len=7, max_blocks=2, bos=BOS).tolist() == blocks[:2]


def test_blocks_where_bos_is_eos():
    """OPT: one such token stands between documents, not two."""
    tokenizer = styled_tokenizer("llama3")
    tokenizer.eos_token = "<s>"
    blocks = concat_blocks(["the"] * 9, tokenizer, seq_len=5, max_blocks=None, bos=BOS).tolist()
    assert len(blocks) > 3
    assert all((BOS, BOS) not in list(itertools.pairwise(block)) for block in blocks)


def test_crops_hold_bos_where_documents_begin_or_always(styled):
    texts = ["the while statement is used for repeated execution " * 3] * 60
    ids = styled(texts[0])["input_ids"]
    size = len(ids) - 3
    crops = crop_documents(texts, styled, seq_len=size, max_sequences=None, seed=0, bos=BOS).tolist()
    assert {crop[0] == BOS for crop in crops} == {True, False}
    assert all(crop in [ids[start : start + size] for start in range(4)] for crop in crops)
    crops = crop_documents(texts, styled, seq_len=size, max_sequences=None, seed=0, bos=BOS, each=True).tolist()
    assert all(crop[0] == BOS and crop[1:] in [ids[s : s + size - 1] for s in range(1, 6)] for crop in crops)


def module(tokenizer, *, needs_bos=False, **kwargs):
    sizes = {"seq_len": 64, "calibration_sequences": 4, "recovery_sequences": 8, "eval_window": 32, "eval_windows": 3}
    data = TextDataModule(**sizes | kwargs)
    data.bind(tokenizer, vocab_size=400, max_positions=None, needs_bos=needs_bos)
    return data


@pytest.mark.parametrize(("setting", "there"), [("auto", True), ("always", True), ("never", False)])
@pytest.mark.parametrize("packing", [False, True])
def test_every_role_begins_with_bos(styled, setting, there, packing):
    data = module(styled, bos=setting, packing=packing)
    for loader in (data.calibration_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert all((batch["input_ids"][:, 0] == BOS).all() == there for batch in loader)
    batch = next(iter(data.train_dataloader()))
    begins = batch["position_ids"] == 0 if packing else torch.arange(batch["input_ids"].shape[1]) == 0
    first = batch["input_ids"][(begins.expand_as(batch["input_ids"])) & (batch["attention_mask"] == 1)]
    assert (first == BOS).all() == there
    line = "each begins with BOS" if there else "no BOS added"
    assert line in data.evaluation_windows().protocol
    assert {data.summary()[role]["bos"] for role in ("calibration", "recovery", "validation", "evaluation")} == {line}


def test_streams_begin_with_bos(tmp_path, styled):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"instruction": "the", "output": f"is {n}"}) + "\n" for n in range(9)))
    sizes = {"recovery": str(path), "streaming": True, "seq_len": 600, "recovery_sequences": None}
    data = module(styled, **sizes)
    assert (next(iter(data.train_dataloader()))["input_ids"][:, 0] == BOS).all()
    assert data.summary()["recovery"]["bos"] == "each begins with BOS"


def test_tokenizers_without_the_habit_are_left_alone():
    tokenizer = tiny_tokenizer()
    auto, never = (module(tokenizer, bos=setting) for setting in ("auto", "never"))
    assert torch.equal(auto._calibration_ids(), never._calibration_ids())
    assert torch.equal(auto.evaluation_windows().ids, never.evaluation_windows().ids)


def test_the_former_name_still_works(styled):
    with pytest.warns(
        FutureWarning, match="eval_bos is deprecated and replaced by bos, .* eval_bos=(True|False) means bos="
    ):
        data = module(styled, eval_bos=False)
    assert not data.evaluation_windows().bos
    assert (data._calibration_ids()[:, 0] == BOS).all()
    with pytest.warns(FutureWarning):
        assert module(tiny_tokenizer(), eval_bos=True).evaluation_windows().bos
    with pytest.raises(ConfigError, match="bos='never' contradicts eval_bos=True"):
        module(styled, bos="never", eval_bos=True)


def test_bos_settings_that_cannot_be(styled):
    with pytest.raises(ConfigError, match="bos='sometimes' must be one of auto, always, never"):
        TextDataModule(bos="sometimes")
    tokenizer = styled_tokenizer("llama2")
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="bos='always': the tokenizer has no BOS token"):
        module(tokenizer, bos="always")


def test_kept_tokens_of_another_setting_are_not_used(tmp_path, styled):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "the", "output": "is a"}]))
    made = {}
    for setting in ("auto", "never", "always", "auto"):
        data = module(
            styled, bos=setting, recovery=str(path), validation="builtin", seq_len=600, token_cache=str(tmp_path / "c")
        )
        (example,) = data._build.examples("recovery", None)
        assert made.setdefault(setting, example) == example
    assert made["never"][0] == made["auto"][0][1:]


def test_gemma_is_known_to_need_bos():
    assert {name for name in NAMES if predicts_badly_without_bos(configs()[name])} == {"gemma2", "gemma3"}


def test_a_class_that_needs_bos_is_warned_of_sequences_without(tmp_path):
    tokenizer = styled_tokenizer("gemma")
    folder = save_tiny(tmp_path / "m", "gemma2", tokenizer=tokenizer)
    sizes = {"seq_len": 32, "calibration_sequences": 4, "eval_window": 32, "eval_windows": 2}

    def evaluate(**kwargs):
        trainer = PruneTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        return trainer.evaluate(PruningModule(folder), TextDataModule(**sizes | kwargs), latency=False)

    found = evaluate()
    (stage,) = found.values()
    assert "each begins with BOS" in stage["perplexity"]["protocol"]
    with pytest.warns(
        UserWarning, match="2 of 2 sequences do not begin with BOS, .* predict badly without it. Give bos='always'"
    ):
        evaluate(bos="never")
    crops = module(tokenizer, calibration_layout="crop", seq_len=16, needs_bos=True)
    with pytest.warns(UserWarning, match="calibration='builtin': . of 4 sequences do not begin with BOS"):
        crops.calibration_dataloader()
    crops = module(tokenizer, calibration_layout="crop", seq_len=16, bos="always", needs_bos=True)
    crops.calibration_dataloader()
    assert crops.summary()["calibration"]["bos"] == "each begins with BOS"
