"Every notebook runs, cell by cell, in a kernel of its own, as it does in JupyterLab"
import re, resource
from contextlib import nullcontext
import nbformat
import pytest
from nbclient import NotebookClient
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from zygote import zygote

cfg = get_config()
SKIPPED = re.compile(rf'^#\|\s*(eval:\s*false|{"|".join(cfg.tst_flags.split())})\s*$', re.M)
CPU_SECONDS = 120 # a minute on two cores, whatever else the machine is doing

ORDINARY = {'index', '45_tiny_priors'} # start as in JupyterLab; 45_tiny_priors says how Triton is to be imported

def cpu_seconds(): # of processes that have ended, and what those that were forked were spared
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime + zygote.forks*zygote.cpu

# experiments (7*) run under papermill instead: see test_papermill
@pytest.mark.parametrize('notebook', [n for n in sorted(nbglob(as_path=True)) if not n.stem.startswith('7')], ids=lambda p: p.stem)
def test_notebook(notebook):
    lesson, began = nbformat.read(notebook, 4), cpu_seconds()
    lesson.cells = [c for c in lesson.cells if c.cell_type != 'code' or not SKIPPED.search(c.source)]
    with zygote.away() if notebook.stem in ORDINARY else nullcontext():
        NotebookClient(lesson, kernel_name='python3', timeout=600, resources=dict(metadata=dict(path=notebook.parent))).execute()
    took = cpu_seconds() - began
    assert took < CPU_SECONDS, f'{notebook.name} took {took:.0f} s of CPU time'
