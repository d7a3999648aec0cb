"Notebooks are functions: they run under papermill as they run under nbdev"
import json
import papermill
import pytest
from nbdev.config import get_config

NBS = get_config().config_path/'nbs'
EXPERIMENTS = sorted(NBS.glob('7*.ipynb'))
KEEPS = {'70_reconstruct': {}, '77_ablations': dict(words='learned'), '78_paper_or_official': {}} # those that go on where they were stopped

def run(notebook, out, given):
    done = papermill.execute_notebook(notebook, out/'out.ipynb', given | dict(out=str(out)), cwd=notebook.parent, progress_bar=False, kernel_name='python3')
    assert not any(o.output_type == 'error' for c in done.cells for o in c.get('outputs', []))
    return json.loads((out/'metrics.json').read_text())

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=lambda p: p.stem)
def test_runs_under_papermill(notebook, tmp_path):
    "and what is there of a run, up to all of it but the report, is not made again"
    given = KEEPS.get(notebook.stem, {})
    first = run(notebook, tmp_path, given)
    assert first and (tmp_path/'preview.jpg').is_file()
    if notebook.stem not in KEEPS: return
    kept = {p: p.stat().st_mtime_ns for pattern in ('word.safetensors', '*/mesh.*', '*/metrics.json', '*/log.jsonl') for p in tmp_path.glob(pattern)}
    (tmp_path/'metrics.json').unlink()
    assert run(notebook, tmp_path, given) == first
    assert len(kept) > 1 and all(p.stat().st_mtime_ns == t for p, t in kept.items())
