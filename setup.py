"""What pyproject.toml cannot say: the recipes of configs/ come with the package, as deepstack_jax/configs/."""

from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["deepstack_jax*"])
if Path("configs").is_dir():  # an image installs the dependencies before there is any code
    packages += ["deepstack_jax.configs", "deepstack_jax.configs.mixtures", "deepstack_jax.configs.lmms_eval"]
setup(packages=packages, package_dir={"deepstack_jax.configs": "configs"})
