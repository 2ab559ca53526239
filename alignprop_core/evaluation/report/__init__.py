"""The report of a run, or of several side by side: one HTML page that opens offline. No torch.

Everything is read from the run folder's files, so a page can be made beside a running process, of an interrupted run,
or of one that an older version wrote.
"""

from alignprop_core.evaluation.report.page import run_page, write_page
from alignprop_core.evaluation.report.read import Run, read_run
from alignprop_core.evaluation.report.several import several_page

__all__ = ["Run", "read_run", "run_page", "several_page", "write_page"]
