"""Adds the top-level ``configs/`` to a built package, as ``hfprune/configs/``; the metadata is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the configs beside the modules; an editable install reads them from the checkout."""

    def run(self) -> None:
        """Builds the package."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "hfprune" / "configs"
            shutil.rmtree(target, ignore_errors=True)  # a config that was removed is in no later wheel
            shutil.copytree("configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})
