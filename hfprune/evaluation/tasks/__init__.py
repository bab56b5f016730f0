"""Task files for lm-eval: groups of the papers' tasks, and the tasks on local copies of their data."""

from pathlib import Path

GROUPS_FOLDER = Path(__file__).parent / "groups"
"""``paper10``, ``llmpruner7`` and ``zpruner5``: pass it to ``lm_eval --include_path``."""

LOCAL_FOLDER = Path(__file__).parent / "local"
"""Stock tasks that read their data from ``data_dir``, given as metadata, in place of the hub."""
