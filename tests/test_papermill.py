"Notebooks are functions: they run under papermill as they run under nbdev"
import papermill
import pytest
from nbdev.config import get_config

NBS = get_config().config_path/'nbs'
EXPERIMENTS = sorted(NBS.glob('7*.ipynb'))

@pytest.mark.parametrize('notebook', EXPERIMENTS or [NBS/'03_losses.ipynb'], ids=lambda p: p.stem)
def test_runs_under_papermill(notebook, tmp_path):
    done = papermill.execute_notebook(notebook, tmp_path/'out.ipynb', cwd=notebook.parent, progress_bar=False, kernel_name='python3')
    assert not any(o.output_type == 'error' for c in done.cells for o in c.get('outputs', []))
