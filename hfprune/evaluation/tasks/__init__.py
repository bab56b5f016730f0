"""Task files for lm-eval: task groups of papers, and tasks on local data."""

from pathlib import Path

GROUPS_FOLDER = Path(__file__).parent / "groups"
"""Folder of ``paper10``, ``llmpruner7`` and ``zpruner5``, for ``include_path`` of lm-eval."""

LOCAL_FOLDER = Path(__file__).parent / "local"
"""Folder of stock tasks that read their data from ``data_dir`` in the metadata instead of the hub."""
