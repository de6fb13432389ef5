"""scikit-learn's bundled digits: 1,797 images of 8 x 8 pixels, no download."""

from __future__ import annotations

import torch

from tempering.data.batches import Batches, Splits

MEAN, STD = (0.3053,), (0.3759,)
VALIDATION, TEST = 359, 360


def digits(*, batch_size: int = 64, crop: int = 0, seed: int = 0, channels_last: bool = False) -> Splits:
    """1,078 / 359 / 360 images (1, 8, 8) of ten digits; the split is fixed, every digit in proportion.

    Args:
        batch_size: of all three splits.
        crop: as Batches has it, for training.
        seed: of order and augmentation; not of the split.
        channels_last: the inputs' memory format.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('digits() reads scikit-learn\'s data: pip install "tempering[data]"') from error
    values, labels = load_digits(return_X_y=True)  # 0 to 16
    images = (torch.from_numpy(values).view(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
    whole = Batches(
        images,
        torch.from_numpy(labels).long(),
        batch_size=batch_size,
        mean=MEAN,
        std=STD,
        shuffle=True,
        crop=crop,
        seed=seed,
        channels_last=channels_last,
        class_names=[str(i) for i in range(10)],
        name="digits",
    )
    rest, test = whole.split(TEST, seed=0)
    train, validation = rest.split(VALIDATION, seed=0)
    return Splits(train, validation, test)
