"""The switch that a search sets in its trials."""

from contextvars import ContextVar

# while it is on, distill() leaves the test split alone and refuses a run without a validation split
SEARCHING: ContextVar[bool] = ContextVar("searching", default=False)
