"""Commands that read no weights start without torch and transformers."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["inspection", "card", "engines", "push"])
def test_no_heavy_package_is_imported(module):
    code = f"import sys, hfprune.publishing.{module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
