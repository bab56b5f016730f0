"""Check of an export in the engine that will serve it: the same greedy tokens and log-probabilities as in memory.

Each engine runs in a separate process, in the Python of the environment variable ``HFPRUNE_<ENGINE>_PYTHON`` or in
the one that runs hfprune: most engines ask for other versions of transformers than hfprune. hfprune is not used there,
except for the vLLM plugin.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune.utils.errors import ConfigError, OutputError

TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "In 1905, a clerk at the patent office in Bern published",
)
"""Prompts of the check."""

NEW_TOKENS = 32
TOLERANCE = 0.01
"""Accepted difference of log-probabilities in float32, in nats; tokens this close are equal."""

_MISSING = 3  # exit status of a script whose engine is not installed

_TRANSFORMERS = """
import json, sys
sys.modules["hfprune"] = None
try:
    import torch, transformers
except ImportError:
    sys.exit(3)
folder, prompts, number = json.loads(sys.argv[1])
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
tokens, scores = [], []
for prompt in prompts:
    ids, cache, made = torch.tensor([prompt]), None, []
    for _ in range(number):
        with torch.no_grad():
            output = model.eval()(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, found = output.past_key_values, output.logits[0, -1].log_softmax(-1)
        if not made:
            best = found.topk(min(5, len(found)))
            scores.append({str(i): v for i, v in zip(best.indices.tolist(), best.values.tolist())})
        made.append(int(found.argmax()))
        ids = torch.tensor([made[-1:]])
    tokens.append(made)
print(json.dumps({"version": transformers.__version__, "tokens": tokens, "scores": scores}))
"""

_VLLM = """
import json, os, sys
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
try:
    import vllm
except ImportError:
    sys.exit(3)
folder, prompts, number = json.loads(sys.argv[1])
code = "AutoConfig" in json.load(open(folder + "/config.json")).get("auto_map", {})
code = code and json.load(open(folder + "/config.json"))["model_type"] != "hfprune"
llm = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=max(map(len, prompts)) + number,
               max_num_seqs=len(prompts), skip_tokenizer_init=True, trust_remote_code=code, max_logprobs=5)
settings = vllm.SamplingParams(temperature=0, max_tokens=number, ignore_eos=True, detokenize=False, logprobs=5)
made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
tokens = [list(one.outputs[0].token_ids) for one in made]
scores = [{str(i): v.logprob for i, v in one.outputs[0].logprobs[0].items()} for one in made]
print(json.dumps({"version": vllm.__version__, "tokens": tokens, "scores": scores}), flush=True)
os._exit(0)  # an engine in this process may keep it alive
"""

SCRIPTS = {"transformers": _TRANSFORMERS, "transformers4": _TRANSFORMERS, "vllm": _VLLM}
"""Engine -> script that prints the version, the greedy tokens and the best log-probabilities after each prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCheck:
    """Outcome of a check.

    Attributes:
        engine: Name of the engine.
        version: Its version; None if it is not installed, and nothing was run.
        equal_tokens: Greedy tokens that are equal, per prompt, of ``new_tokens``.
        new_tokens: Number of greedy tokens per prompt.
        difference: Largest difference of the log-probabilities after a prompt, in nats.
    """

    engine: str
    version: str | None = None
    equal_tokens: tuple[int, ...] = ()
    new_tokens: int = NEW_TOKENS
    difference: float = 0.0

    def __str__(self) -> str:
        """Returns the outcome as a sentence."""
        if self.version is None:
            variable = python_variable(self.engine)
            return f"{self.engine} is not installed here and was not run: {variable} names a Python that has it."
        return (
            f"{self.engine} {self.version}: greedy tokens equal to hfprune's {self.equal_tokens} of {self.new_tokens}, "
            f"log-probabilities within {self.difference:.1g} nats."
        )


def python_variable(engine: str) -> str:
    """Returns the environment variable with the Python of an engine.

    >>> python_variable("vllm")
    'HFPRUNE_VLLM_PYTHON'
    """
    return f"HFPRUNE_{engine.upper()}_PYTHON"


def check_engine(folder: str | Path, model: Any, engine: str, *, tokenizer: Any = None) -> EngineCheck:
    """Loads a folder in an engine and compares it with the model in memory, both in float32.

    Args:
        folder: The exported folder.
        model: The model from which it was exported; its weights become float32.
        engine: Name in :data:`SCRIPTS`.
        tokenizer: Tokenizer of the prompts; fixed token ids are used without one.

    Returns:
        The outcome; without a version if the engine is not installed.

    Raises:
        ConfigError: hfprune cannot run the engine.
        OutputError: The engine failed, or computes something else.
    """
    if engine not in SCRIPTS:
        raise ConfigError(f"engine='{engine}' cannot be run by hfprune. Known: {', '.join(SCRIPTS)}.")
    prompts = prompt_ids(tokenizer, int(model.config.vocab_size))
    answer = _run(engine, Path(folder), prompts)
    if answer is None:
        return EngineCheck(engine=engine)
    model.float().eval()
    equal, difference, alike = [], 0.0, True
    for prompt, tokens, scores in zip(prompts, answer["tokens"], answer["scores"], strict=True):
        expected = greedy(model, prompt, NEW_TOKENS)
        equal.append(_equal(expected, tokens))
        alike = alike and _tied(expected, tokens, equal[-1])
        difference = max(difference, *(abs(float(expected[0, int(i)]) - value) for i, value in scores.items()))
    found = EngineCheck(
        engine=engine, version=answer["version"], equal_tokens=tuple(equal), difference=float(difference)
    )
    if not alike or not difference <= TOLERANCE:
        raise OutputError(f"'{folder}' is not what hfprune computes in {found}")
    return found


def prompt_ids(tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """Returns the token ids of the prompts; ids that are spread over the vocabulary without a tokenizer.

    >>> prompt_ids(None, 100)
    [[3, 10, 17, 24, 31], [38, 45, 52, 59, 66], [73, 80, 87, 94, 1]]
    """
    if tokenizer is not None:
        return [list(tokenizer(text).input_ids) for text in TEXTS]
    return [[(3 + 7 * (5 * row + place)) % vocabulary for place in range(5)] for row in range(len(TEXTS))]


def greedy(model: Any, prompt: Sequence[int], number: int) -> Tensor:
    """Returns the log-probabilities [number, V] of greedy decoding; the tokens are their largest entries.

    Args:
        model: A causal LM.
        prompt: Token ids.
        number: Number of new tokens.
    """
    ids, cache, rows = torch.tensor([list(prompt)], device=model.device), None, []
    for _ in range(number):
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1].float().log_softmax(-1).cpu())
        ids = rows[-1].argmax().reshape(1, 1).to(model.device)
    return torch.stack(rows)


def _equal(expected: Tensor, tokens: Sequence[int]) -> int:
    """Returns the number of tokens before the first one that is not the most likely."""
    best = expected.argmax(-1).tolist()
    return next((place for place, pair in enumerate(zip(best, tokens, strict=True)) if pair[0] != pair[1]), len(best))


def _tied(expected: Tensor, tokens: Sequence[int], place: int) -> bool:
    """Returns whether the token at ``place``, if there is one, is as likely as the expected token."""
    return place == len(expected) or float(expected[place].max() - expected[place, tokens[place]]) <= TOLERANCE


def _run(engine: str, folder: Path, prompts: list[list[int]]) -> dict[str, Any] | None:
    """Returns the answer of an engine's script; None if the engine is not installed."""
    python = os.environ.get(python_variable(engine), sys.executable)
    arguments = json.dumps([str(folder.absolute()), prompts, NEW_TOKENS])
    try:
        run = subprocess.run(  # noqa: S603
            [python, "-c", SCRIPTS[engine], arguments], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(f"{python_variable(engine)}='{python}' cannot be run: {error.strerror}.") from error
    if run.returncode == _MISSING:
        return None
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise OutputError(f"{engine} cannot load '{folder}': {last}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found
