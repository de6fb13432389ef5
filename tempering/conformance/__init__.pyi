from . import adapters as adapters
from .promises import Promises as Promises
from .report import Report as Report
from .report import Result as Result
from .report import Status as Status
from .runner import check as check
from .runner import invariants as invariants
