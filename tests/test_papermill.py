"Notebooks are functions: they run under papermill as they run under nbdev"
import json
import papermill
import pytest
from nbdev.config import get_config

NBS = get_config().config_path/'nbs'
EXPERIMENTS = sorted(NBS.glob('7*.ipynb'))

def run(notebook, out, **given):
    out.mkdir(exist_ok=True)
    done = papermill.execute_notebook(notebook, out/'out.ipynb', given | dict(out=str(out)), cwd=notebook.parent, progress_bar=False, kernel_name='python3')
    assert not any(o.output_type == 'error' for c in done.cells for o in c.get('outputs', []))
    return json.loads((out/'metrics.json').read_text())

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=lambda p: p.stem)
def test_runs_under_papermill(notebook, tmp_path):
    assert run(notebook, tmp_path/'run') and (tmp_path/'run'/'preview.jpg').is_file()

@pytest.mark.parametrize('name, given', {'70_reconstruct': {}, '77_ablations': dict(words='learned'), '78_paper_or_official': {}}.items())
def test_a_killed_run_goes_on(name, given, tmp_path):
    "Whatever is there of a run, up to all of it but the report, is not made again"
    out, notebook = tmp_path/'run', NBS/f'{name}.ipynb'
    first = run(notebook, out, **given)
    kept = {p: p.stat().st_mtime_ns for pattern in ('word.safetensors', '*/mesh.*', '*/metrics.json', '*/log.jsonl') for p in out.glob(pattern)}
    (out/'metrics.json').unlink()
    assert run(notebook, out, **given) == first and len(kept) > 1
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
