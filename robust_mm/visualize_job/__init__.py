"""``robust-mm visualize``: the inputs that activate the classes of a run.

Inside, each module imports only from those before it: asking, measures,
grids, job.
"""

from robust_mm.visualize_job.asking import Question
from robust_mm.visualize_job.job import of_evaluation
from robust_mm.visualize_job.job import run
from robust_mm.visualize_job.job import summary

__all__ = ["Question", "of_evaluation", "run", "summary"]
