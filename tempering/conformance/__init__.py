"""Invariants that any distillation loss can be checked for."""

from tempering.conformance.promises import Promises as Promises
from tempering.conformance.report import Report as Report
from tempering.conformance.report import Result as Result
from tempering.conformance.report import Status as Status
from tempering.conformance.runner import check as check
from tempering.conformance.runner import invariants as invariants
