"""Lets a pruned model answer, side by side with the dense one: interactively, or the prompts that are given.

``hfprune chat OUT --dense DIR``
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hfprune.cli.loading_arguments import add_loading_arguments, loading_of
from hfprune.cli.startup import importing
from hfprune.utils.errors import ConfigError

if TYPE_CHECKING:
    from hfprune.io.loading import LoadingOptions
    from hfprune.publishing.conversation import Conversation

WORD_FLAG = "prompt"
"""The flag that a word after the model may belong to."""

_END = ("exit", "quit")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("model", metavar="OUT", help="folder of a run, a model or adapter folder, or a hub id")
    parser.add_argument("--dense", metavar="DIR", help="dense model that answers as well")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="answer this and end; may be repeated")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 (default): most likely token")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    parser.add_argument("--dense_revision", metavar="R", help="branch, tag or commit of the dense model's hub id")
    parser.add_argument("--dense_subfolder", metavar="DIR", help="folder of the dense model within --dense")
    add_loading_arguments(parser, weights=True)


def run(arguments: Namespace) -> None:
    """Answers the prompts of the command line, or those that are typed."""
    if not arguments.temperature >= 0 or arguments.max_new_tokens < 1:
        raise ConfigError("temperature must be at least 0, and max_new_tokens at least 1.")
    speakers = dict(_loaded(arguments))
    if arguments.prompt:
        for prompt in arguments.prompt:
            _answer(speakers, prompt)
            for speaker in speakers.values():
                speaker.turns = []
        return
    for prompt in _typed():
        try:
            _answer(speakers, prompt)
        except ConfigError as error:  # the next prompt may do
            print(f"error: {error}", file=sys.stderr)


def _loaded(arguments: Namespace) -> Iterator[tuple[str, "Conversation"]]:
    """Yields the name and the conversation of each model."""
    named = {"pruned": arguments.model, "dense": arguments.dense}
    given = {name: path for name, path in named.items() if path is not None}
    own = loading_of(arguments)
    dense = own.elsewhere(revision=arguments.dense_revision, subfolder=arguments.dense_subfolder)
    loading = {"pruned": own, "dense": dense}
    places = {name: _place(path, loading[name]) for name, path in given.items()}  # before transformers is imported

    with importing():
        import torch

        from hfprune.io.load import load_tokenizer
        from hfprune.io.load_any import load_with
        from hfprune.publishing.conversation import Conversation

    try:
        device = torch.device(arguments.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device='{arguments.device}' cannot be used: {str(error).splitlines()[0]}") from error
    for name, (weights, tokenizer, read) in places.items():
        yield (
            name,
            Conversation(
                model=load_with(weights, read).to(device),
                tokenizer=load_tokenizer(tokenizer, loading=read),
                max_new_tokens=arguments.max_new_tokens,
                temperature=arguments.temperature,
                seed=arguments.seed,
                system=arguments.system,
            ),
        )


def _place(path: str, loading: "LoadingOptions") -> tuple[str, str, "LoadingOptions"]:
    """Returns where weights and tokenizer of a model are, and how they are read; the adapter comes with its model."""
    from hfprune.io.output_folder import ADAPTER_FOLDER, MODEL_FOLDER

    folder, inner = Path(loading.within(os.path.expanduser(path))), loading.elsewhere()
    if (folder / "adapter_config.json").is_file():
        return str(folder), str(folder.absolute().parent / MODEL_FOLDER), inner
    if (folder / MODEL_FOLDER / "config.json").is_file():
        adapter = folder / ADAPTER_FOLDER
        weights = adapter if (adapter / "adapter_config.json").is_file() else folder / MODEL_FOLDER
        return str(weights), str(folder / MODEL_FOLDER), inner
    return path, path, loading


def _typed() -> Iterator[str]:
    """Yields the lines that are typed until the end of the input, ``exit`` or ``quit``."""
    shown = "> " if sys.stdin.isatty() else ""
    if shown:
        print("Type a prompt; exit, quit or Ctrl-D ends.")
    while True:
        try:
            line = input(shown).strip()
        except EOFError:
            return
        if line in _END:
            return
        if line:
            yield line


def _answer(speakers: dict[str, "Conversation"], prompt: str) -> None:
    answers = {name: speaker.reply(prompt) for name, speaker in speakers.items()}
    print("\n".join(_side_by_side(prompt, answers.items())), flush=True)


def _side_by_side(prompt: str, answers: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f"prompt | {prompt}"
    for name, text in answers:
        for number, line in enumerate(text.splitlines() or [""]):
            yield f"{name if number == 0 else '':<6} | {line}"
    yield ""
