"""Data sets as batches of tensors; what reads files imports its libraries only when it reads."""

from tempering.data.batches import Batches, Splits
from tempering.data.cifar import cifar100
from tempering.data.coco import coco
from tempering.data.detection import Scenes
from tempering.data.digits import digits
from tempering.data.folders import image_folder
from tempering.data.glue import Sentences
from tempering.data.huggingface import hugging_face
from tempering.data.pairs import Pairs
from tempering.data.synthetic_shapes import shapes
from tempering.data.tokens import Tokens

__all__ = [
    "Batches",
    "Pairs",
    "Scenes",
    "Sentences",
    "Splits",
    "Tokens",
    "cifar100",
    "coco",
    "digits",
    "hugging_face",
    "image_folder",
    "shapes",
]
