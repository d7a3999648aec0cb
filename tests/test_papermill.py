"Notebooks are functions: they run under papermill as they run under nbdev"
import json, subprocess, sys
import papermill
import pytest
from conftest import lay_photos
from nbdev.config import get_config
from papermill.translators import PythonTranslator
from magic123.experiment import expand

NBS = get_config().config_path/'nbs'
EXPERIMENTS = sorted(NBS.glob('7*.ipynb'))
SMALL = {'threads': 1, 'coarse.steps': 3, 'coarse.resolution': 16, 'coarse.reference_resolution': 16, 'fine.steps': 2, 'fine.resolution': 32, 'fine.reference_resolution': 32,
    'nerf.log2_entries': 10, 'nerf.occupancy': 16, 'nerf.samples': 24, 'dmtet.resolution': 16}
SAME = '71_table1', '72_table2', '73_trade_off', '75_gallery', '76_coarse_and_fine' # they make runs of one kind: small ones, of small networks, will do
KEEPS = {'70_reconstruct': dict(settings=SMALL | {'export.perceptual': True, 'export.turntable_views': 2, 'export.turntable_size': 32}), '77_ablations': dict(words='learned', settings=SMALL | {'export.formats': [], 'export.turntable_views': 2, 'export.turntable_size': 32}), '78_paper_or_official': {}} # those that go on where they were stopped

def run(notebook, out, given):
    done = papermill.execute_notebook(notebook, out/'out.ipynb', given | dict(out=str(out)), cwd=notebook.parent, progress_bar=False, kernel_name='python3')
    assert not any(o.output_type == 'error' for c in done.cells for o in c.get('outputs', []))
    return json.loads((out/'metrics.json').read_text())

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=lambda p: p.stem)
def test_runs_under_papermill(notebook, tmp_path, priors):
    "and what is there of a run, up to all of it but the report, is not made again"
    given = dict(settings=SMALL | {f'priors.{k}': v for k, v in priors.items()}) if notebook.stem in SAME else KEEPS.get(notebook.stem, {})
    first = run(notebook, tmp_path, given)
    assert first and (tmp_path/'preview.jpg').is_file()
    if notebook.stem not in KEEPS: return
    kept = {p: p.stat().st_mtime_ns for pattern in ('word.safetensors', '*/mesh.*', '*/metrics.json', '*/log.jsonl') for p in tmp_path.glob(pattern)}
    (tmp_path/'metrics.json').unlink()
    assert run(notebook, tmp_path, given) == first
    assert len(kept) > 1 and all(p.stat().st_mtime_ns == t for p, t in kept.items())

def test_papermill_itself_refuses_what_is_no_parameter(tmp_path):
    "papermill would log a line, run the page with its defaults and exit with 0"
    done = subprocess.run([sys.executable, '-m', 'papermill', '72_table2.ipynb', tmp_path/'out.ipynb', '-p', 'stps', '5', '-k', 'python3', '--no-progress-bar'], cwd=NBS, capture_output=True, text=True)
    assert done.returncode and 'there is no parameter stps' in done.stderr and 'It takes objects, tried, seeds, settings, rows, strips, out' in done.stderr

@pytest.mark.parametrize('notebook', EXPERIMENTS, ids=lambda p: p.stem)
def test_looks_at_its_parameters_first(notebook):
    cells = [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']
    after = next(i for i, c in enumerate(cells) if 'parameters' in c['metadata'].get('tags', [])) + 1
    assert ''.join(cells[after]['source']).startswith('no_other_parameters()\n')

@pytest.mark.parametrize('grid', sorted((NBS/'grids').glob('*.yaml')), ids=lambda p: p.stem)
def test_a_shipped_grid_arrives_as_it_was_sent(grid, tmp_path, monkeypatch):
    "papermill writes parameters as Python; what it does not know becomes a string"
    lay_photos(grid, tmp_path)
    monkeypatch.chdir(tmp_path)
    runs = {(r.labels.get('recipe'), str(r.parameters.get('settings'))): r.parameters for r in expand(grid, tmp_path/'out')}
    assert runs
    for parameters in runs.values():
        arrived = {}
        exec(PythonTranslator.codify(parameters), arrived)
        assert {k: arrived[k] for k in parameters} == parameters
