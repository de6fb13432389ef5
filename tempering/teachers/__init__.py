"""Teachers: where the teacher's numbers come from."""

from tempering.teachers.base import Teacher, fingerprint
from tempering.teachers.cache.hidden import CachedHidden, record_hidden
from tempering.teachers.cache.logits import Cached, record
from tempering.teachers.cache.sampled import CachedDrawn, record_drawn
from tempering.teachers.cache.top_k import CachedSparse, record_sparse
from tempering.teachers.live import Live
from tempering.teachers.remote.teacher import Served
from tempering.teachers.remote.verify import ServedDiffers, selftest
from tempering.teachers.selection import Kept

__all__ = [
    "Cached",
    "CachedDrawn",
    "CachedHidden",
    "CachedSparse",
    "Kept",
    "Live",
    "Served",
    "ServedDiffers",
    "Teacher",
    "fingerprint",
    "record",
    "record_drawn",
    "record_hidden",
    "record_sparse",
    "selftest",
]
