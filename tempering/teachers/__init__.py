"""Teachers: where the teacher's numbers come from."""

from tempering.teachers.base import Teacher, fingerprint
from tempering.teachers.cached import Cached, record
from tempering.teachers.live import Live

__all__ = ["Cached", "Live", "Teacher", "fingerprint", "record"]
