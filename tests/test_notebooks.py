"Every notebook runs, cell by cell, as a test"
import re, subprocess, sys, time
import matplotlib
import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

matplotlib.use('agg')
cfg = get_config()
CPU_SECONDS = 120 # a minute on two cores, whatever else the machine is doing

def run_here(notebook): return run_nb(notebook.absolute(), skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)[0]

def run_alone(notebook):
    "For pages that set environment variables, which libraries read once"
    code = f'import matplotlib, sys; matplotlib.use("agg"); from pathlib import Path; from nbdev.test import test_nb; sys.exit(not test_nb(Path({str(notebook.absolute())!r}), skip_flags={cfg.tst_flags.split()}, basepath=Path({str(cfg.config_path)!r}))[0])'
    return subprocess.run([sys.executable, '-c', code]).returncode == 0

# experiments (7*) run under papermill instead: see test_papermill
@pytest.mark.parametrize('notebook', [n for n in sorted(nbglob(as_path=True)) if not n.stem.startswith('7')], ids=lambda p: p.stem)
def test_notebook(notebook):
    alone = re.search(r"os\.environ\['\w+'\] = ", notebook.read_text())
    began = time.process_time()
    assert (run_alone if alone else run_here)(notebook), f'{notebook.name} failed'
    took = time.process_time() - began
    assert took < CPU_SECONDS, f'{notebook.name} took {took:.0f} s of CPU time'
