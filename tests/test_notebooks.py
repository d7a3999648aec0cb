"Every notebook runs, cell by cell, as a test"
import time
import matplotlib
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

matplotlib.use('agg')
cfg = get_config()
CPU_SECONDS = 120 # a minute on two cores, whatever else the machine is doing

@pytest.mark.parametrize('notebook', sorted(nbglob(as_path=True)), ids=lambda p: p.stem)
def test_notebook(notebook):
    began = time.process_time()
    ok, _ = run_nb(notebook.absolute(), skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
    took = time.process_time() - began
    assert ok, f'{notebook.name} failed'
    assert took < CPU_SECONDS, f'{notebook.name} took {took:.0f} s of CPU time'
