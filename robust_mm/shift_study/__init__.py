"""``robust-mm shift``: trained on every T, evaluated on every E, compared.

Inside, each module imports only from those before it: budgets, plan, making,
writing, job.
"""

from robust_mm.shift_study.job import run
from robust_mm.shift_study.plan import Study
from robust_mm.shift_study.plan import prepare
from robust_mm.shift_study.writing import summary

__all__ = ["Study", "prepare", "run", "summary"]
