"""A real image-classification task that needs no download: the handwritten digits that scikit-learn carries.

1797 images of 8 x 8 pixels, ten classes (UCI "Optical Recognition of Handwritten Digits", its test part). The split is
fixed and keeps the share of each class; as the data set does not say who wrote a digit, one hand may occur in several
splits.

    python examples/classification/embedded_images.py        # sizes, classes, some digits as text
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import DatasetDict


VALIDATION_SIZE = TEST_SIZE = 300


def build_embedded_images() -> DatasetDict:
    """Builds the task from scikit-learn's copy of the digits.

    Returns:
        `DatasetDict` with splits `train` (1197 images), `validation` and `test` (300 each) and columns `image` (grey,
        8 x 8) and `label` (class names "0" to "9" in its feature); always the same rows in the same order.

    Source: https://archive.ics.uci.edu/dataset/80, E. Alpaydin and C. Kaynak, 1998, CC BY 4.0.
    """
    import numpy as np
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from PIL import Image as PillowImage
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # grey levels 0 to 16
    rest, test = train_test_split(np.arange(len(pixels)), test_size=TEST_SIZE, stratify=digits.target, random_state=0)
    train, validation = train_test_split(rest, test_size=VALIDATION_SIZE, stratify=digits.target[rest], random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})

    def split(indices: np.ndarray) -> Dataset:
        images = [PillowImage.fromarray(pixels[index]) for index in indices]
        return Dataset.from_dict({"image": images, "label": digits.target[indices].tolist()}, features=features)

    return DatasetDict({"train": split(train), "validation": split(validation), "test": split(test)})


def main() -> None:
    task = build_embedded_images()
    for name, part in task.items():
        counts = Counter(part["label"])
        print(f"{name}: {len(part)} images:", ", ".join(f"{label}: {counts[label]}" for label in sorted(counts)))
    for row in task["validation"].select(range(3)):
        print(f"\n{row['label']}")
        pixels = list(row["image"].tobytes())
        for start in range(0, 64, 8):
            print("".join(" .:-=+*#%@"[pixel * 9 // 255] for pixel in pixels[start : start + 8]))


if __name__ == "__main__":
    main()
