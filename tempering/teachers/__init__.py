"""Teachers: where the teacher's numbers come from."""

from tempering.teachers.base import Teacher, fingerprint
from tempering.teachers.cached import Cached, record
from tempering.teachers.live import Live
from tempering.teachers.sparse import CachedSparse, Kept, record_sparse

__all__ = ["Cached", "CachedSparse", "Kept", "Live", "Teacher", "fingerprint", "record", "record_sparse"]
