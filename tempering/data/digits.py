"""Load scikit-learn's digits, 1,797 images of 8 x 8 pixels, without a download."""

from __future__ import annotations

import torch

from tempering.data.batches import Batches, Splits

MEAN, STD = (0.3053,), (0.3759,)
VALIDATION, TEST = 359, 360


def digits(*, batch_size: int = 64, crop: int = 0, seed: int = 0, channels_last: bool = False) -> Splits[Batches]:
    """Load 1,078 / 359 / 360 images (1, 8, 8) of ten digits; the splits are fixed and stratified by class.

    Args:
        batch_size: of all three splits.
        crop: of the training images, as in ``Batches``.
        seed: of order and augmentation; not of the splits.
        channels_last: use the channels_last memory format for the inputs.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('digits() reads scikit-learn\'s data: pip install "tempering[data]"') from error
    values, labels = load_digits(return_X_y=True)  # 0 to 16
    images = (torch.from_numpy(values).view(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
    data = Batches(
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
    train, test = data.split(TEST, seed=0)
    train, validation = train.split(VALIDATION, seed=0)
    return Splits(train, validation, test)
