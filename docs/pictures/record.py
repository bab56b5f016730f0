"""Records a terminal session: runs the commands below on the demo model and renders what they print as SVG.

python docs/pictures/record.py [--render]

The output is stored in ``session.json`` in this folder. ``session.svg`` shows it unchanged, except that lines on
progress are left out and counted. ``--render`` draws the SVG from the stored session alone.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

HERE = Path(__file__).resolve().parent
SESSION = HERE / "session.json"
PICTURE = HERE / "session.svg"
TITLE = "hfprune"
WIDTH = 108
PROGRESS = re.compile(r" (left|so far)$")

COMMANDS = (
    "hfprune plan smollm2-135m --ratio 0.1 0.2 0.3 --round_to 64",
    "hfprune prune smollm2-135m --ratio 0.2 --round_to 64 --data.calibration_sequences 16 --data.seq_len 128 "
    "--data.eval_windows 2 --data.eval_window 256 --latency false -o OUT",
    "hfprune chat OUT --dense smollm2-135m --prompt 'What is the capital of France?' --max_new_tokens 16",
)
THEME = TerminalTheme((38, 50, 56), (236, 239, 241), [(38, 50, 56)] * 8, [(128, 203, 196)] * 8)
FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>Terminal session: hfprune plan, prune and chat</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-family: system-ui, Helvetica, Arial, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""Rich's own format loads a font from another host; this one takes a monospace font of the reader's system."""


def record() -> list[dict[str, Any]]:
    """Runs the commands one after another in a new folder and returns each with its output, as a terminal shows it."""
    launcher = "import sys; from hfprune.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "COLUMNS": str(WIDTH), "PYTHONPATH": str(HERE.parents[1])}
    session = []
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            words = [sys.executable, "-c", launcher, *shlex.split(command)[1:]]
            done = subprocess.run(  # noqa: S603  # the commands above
                words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if done.returncode:
                raise SystemExit(f"{command}: exit status {done.returncode}\n{done.stdout}")
            session.append({"command": command, "output": done.stdout.rstrip("\n").splitlines()})
    return session


def shown(output: list[str]) -> list[str]:
    """Returns an output in which every run of lines on progress is one line that counts them."""
    found: list[str] = []
    for progress, lines in groupby(output, key=lambda line: bool(PROGRESS.search(line))):
        run = list(lines)
        found += [f"[{len(run)} lines on progress]"] if progress and len(run) > 1 else run
    return found


def render(session: list[dict[str, Any]]) -> str:
    """Returns a session as SVG."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        for number, entry in enumerate(session):
            text = Text("" if number == 0 else "\n")
            text.append("$ ", style="#80cbc4 bold").append(entry["command"], style="bold")
            for line in shown(entry["output"]):
                text.append(f"\n{line}")
            console.print(text, overflow="fold", highlight=False)
        return console.export_svg(title=TITLE, theme=THEME, code_format=FORMAT, unique_id="session")


def main() -> None:
    """Records the session unless a stored one is to be rendered, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="draw the stored session, run nothing")
    if not parser.parse_args().render:
        SESSION.write_text(json.dumps(record(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PICTURE.write_text(render(json.loads(SESSION.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
