"""Commands of the command line: what each does."""

from hfprune.cli.simple_commands import SIMPLE_COMMANDS

COMMANDS = {
    "fit": "calibrate, prune and recover with LoRA in one run",
    "prune": "calibrate and prune, without recovery",
    "evaluate": "perplexity, fidelity to a dense model, zero-shot tasks, size and speed",
    "sweep": "compare methods, ratios and seeds in one table",
    "export": "write a pruned model in another layout, or as GGUF",
    **SIMPLE_COMMANDS,
}
"""Command -> what it does."""
