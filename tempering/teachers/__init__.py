"""Teachers: where the teacher's numbers come from."""

from tempering.teachers.base import Teacher, fingerprint
from tempering.teachers.cached import Cached, record
from tempering.teachers.drawn import CachedDrawn, record_drawn
from tempering.teachers.hidden import CachedHidden, record_hidden
from tempering.teachers.live import Live
from tempering.teachers.selftest import ServedDiffers, selftest
from tempering.teachers.served import Served
from tempering.teachers.sparse import CachedSparse, Kept, record_sparse

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
