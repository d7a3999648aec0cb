"What must be true of the repository as a whole"
import json, re, shutil, subprocess, sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
import nbformat
import pytest
from nbdev.config import get_config
from packaging.requirements import Requirement

ROOT = get_config().config_path
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
MB = 2**20

def cells(notebook, kind): return [c for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == kind]
def source(cell): return ''.join(cell['source'])
def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}
def tracked():
    out = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: pytest.skip('not a git checkout')
    return [ROOT/name for name in out.stdout.split('\0') if name and (ROOT/name).is_file()]

def test_package_and_notebooks_agree(tmp_path):
    "`nbdev_export && nbdev_clean` changes nothing"
    for name in ('nbs', 'magic123'): shutil.copytree(ROOT/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    for name in ('settings.ini', 'setup.py', 'README.md'): shutil.copy(ROOT/name, tmp_path)
    before = contents(tmp_path)
    for command in ('nbdev_export', 'nbdev_clean'): subprocess.run([Path(sys.executable).with_name(command)], cwd=tmp_path, check=True, capture_output=True)
    after = contents(tmp_path)
    differ = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert not differ, f'run nbdev_export && nbdev_clean: {sorted(differ)}'

def test_readme_is_the_index(tmp_path):
    from magic123.notebooks import readme
    text = readme(ROOT/'nbs'/'index.ipynb', tmp_path/'README.md')
    assert text == (ROOT/'README.md').read_text(), 'run python -m magic123.notebooks readme'
    for name in re.findall(r'\]\((?!http)([^)#]+)', text): assert (ROOT/name).exists(), f'README links to {name}'

def test_examples_work_in_the_order_of_the_readme(tmp_path, monkeypatch):
    "Its command, then its Python, then the viewer's, all as they stand there, with fewer steps"
    from test_cli import SHORT
    from magic123 import image_to_mesh
    from magic123.cli import main
    from magic123.experiment import expand
    from magic123.recipe import Recipe
    python = lambda text: re.search(r'```python\n(.*?)```', text, re.S)[1]
    readme, viewer = (ROOT/'README.md').read_text(), '\n'.join(map(source, cells(ROOT/'nbs'/'62_viewer.ipynb', 'markdown')))
    for folder in ('runs', 'nbs'): (tmp_path/folder).mkdir()
    (tmp_path/'data').symlink_to(ROOT/'data')
    (tmp_path/'quick.json').write_text(json.dumps(SHORT))
    monkeypatch.chdir(tmp_path)
    assert main([*re.search(r'&& magic123 (run .*)', readme)[1].split(), '--recipe', 'quick.json']) == 0
    monkeypatch.setattr(image_to_mesh, 'reconstruct', partial(image_to_mesh.reconstruct, recipe=SHORT, say=lambda text: None))
    for folder in ('nbs', '.'): # where Python may be started
        monkeypatch.chdir(tmp_path/folder)
        exec(python(readme), space := {})
        assert space['result'].mesh.is_file() and image_to_mesh.Job.open('runs/bear-7').recipe.seed == 7
    for run in expand(ROOT/'nbs'/'grids'/'trade_off.yaml', 'runs/trade_off'): # what the grid would leave of the bear: no mesh
        if not run.folder.name.startswith('teddy_bear_900100'): continue
        shutil.copytree('runs/bear-7', folder := run.folder/'reconstruction', ignore=shutil.ignore_patterns('mesh*', 'turntable*'))
        job, coarse = image_to_mesh.Job.open(folder), Recipe.preset('quick').replace(run.parameters['settings']).coarse
        job.recipe = job.recipe.replace({'coarse.weight_2d': coarse.weight_2d, 'coarse.weight_3d': coarse.weight_3d, 'export.formats': []})
        job.save()
    monkeypatch.chdir(tmp_path/'nbs')
    imports, calls = (''.join(line for line in python(viewer).splitlines(True) if line.startswith('from ') == first) for first in (True, False))
    exec(imports, space := {})
    explored, both, dial, live = (eval(line, space) for line in calls.splitlines())
    assert explored.children[1].titles == ['mesh'] and both.children[1].titles == ['teddy_bear_900003-quick', 'bear-7'] and live.words.value.endswith('done')
    assert [word for word, _ in dial.children[0].children[0].options] == ['0', '0.1', '0.5', '1', '2', '5', '∞']

def test_run_all_goes_on_without_a_gpu(tmp_path):
    "JupyterLab does not know nbdev's flags: a tag lets it go on after a cell that misses its GPU; our own runner, on a GPU, still fails with it"
    from nbclient import NotebookClient
    from magic123.notebooks import run
    flagged = {(n.stem, c['id']): c['metadata'].get('tags', []) for n in NOTEBOOKS for c in cells(n, 'code') if re.search(r'^#\s*\|\s*cuda\b', source(c), re.M)}
    bare = [where for where, tags in flagged.items() if 'raises-exception' not in tags]
    assert flagged and not bare, f'tag them raises-exception: {bare}'
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('#| cuda\nboom', metadata=dict(tags=['raises-exception'])), nbformat.v4.new_code_cell('1 + 1')])
    page.metadata.kernelspec = dict(name='python3', language='python', display_name='python3')
    nbformat.write(page, tmp_path/'page.ipynb')
    with pytest.raises(NameError, match='boom'): run(tmp_path/'page.ipynb', 'cuda')
    assert 'raises-exception' in run(tmp_path/'page.ipynb').read_text() # what `nbdev_clean` keeps
    assert NotebookClient(page).execute().cells[1].outputs[0].data['text/plain'] == '2'

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_title_and_subtitle(notebook):
    assert re.match(r'# \S.*\n+> \S', source(cells(notebook, 'markdown')[0]))

@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.stem[:2].isdigit()], ids=lambda p: p.stem)
def test_notebook_imports_smaller_numbers_only(notebook):
    number = {n.stem[3:]: int(n.stem[:2]) for n in NOTEBOOKS if n.stem[:2].isdigit()}
    exported = '\n'.join(source(c) for c in cells(notebook, 'code') if re.match(r'#\s*\|\s*export', source(c)))
    at_top = set(re.findall(r'^(?:from|import) magic123\.(\w+)', exported, re.M))
    late = {m for m in at_top if number.get(m, 0) >= int(notebook.stem[:2])}
    assert not late, f'{notebook.stem} imports {late}'

@pytest.mark.parametrize('notebook', [n for n in NOTEBOOKS if n.stem.startswith('7')], ids=lambda p: p.stem)
def test_experiment_has_one_parameters_cell(notebook):
    assert sum('parameters' in c['metadata'].get('tags', []) for c in cells(notebook, 'code')) == 1

def test_notebooks_stay_small():
    sizes = {n.stem: n.stat().st_size for n in NOTEBOOKS}
    assert all(s <= 300*1024 for s in sizes.values()), {k: s for k, s in sizes.items() if s > 300*1024}
    assert sum(sizes.values()) <= 5*MB

def test_data_fits_its_budget():
    priors = sum(p.stat().st_size for p in (ROOT/'data'/'priors').rglob('*') if p.is_file())
    assert priors <= 40*MB and sum(p.stat().st_size for p in tracked()) <= 50*MB

def test_requirements():
    cfg = get_config()
    for pin in ('nbdev==2.4.14', 'fastcore<2', 'execnb<0.2', 'ghapi<2'): assert pin in cfg.dev_requirements.split()
    assert not re.search(r'torchvision|lpips|open_clip|timm|fastprogress', cfg.requirements + cfg.dev_requirements)
    for line in (cfg.requirements + ' ' + cfg.dev_requirements).split(): Requirement(line) # a space would cut one in two

def test_kernels_are_interpreted():
    "Pages run their GPU kernels in Triton's interpreter wherever there is Triton, and it is among the tools on Linux"
    marker = next(r.marker for r in map(Requirement, get_config().dev_requirements.split()) if r.name == 'triton')
    assert bool(find_spec('triton')) or not marker.evaluate()

def test_import_brings_no_accelerators():
    modules = [f'magic123.{p.stem}' for p in (ROOT/'magic123').glob('*.py') if not p.stem.startswith('_') and p.stem != 'notebooks']
    code = f'import sys, {", ".join(modules)}; print([m for m in ("nvdiffrast", "tinycudann", "kaolin", "rembg", "diffusers", "transformers") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_command_line_starts_without_torch():
    code = 'import sys, magic123.cli; print("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == 'False'

def test_compiled_code_is_found_again():
    "What numba has made once, on this machine, is not made by every process anew"
    code = '''import torch
from magic123 import hashgrid, raster, toybox
from magic123.cameras import Camera
grid = hashgrid.HashGrid(levels=2, log2_entries=8)
grid(torch.rand(9, 3)).sum().backward()
camera, triangle = Camera.orbit(height=8), torch.eye(3)
toybox.make_toy('mug', 3).render(camera)
raster.rasterize(camera, triangle, torch.tensor([[0, 1, 2]]))
kernels = *hashgrid._numba_kernels(grid.table.shape[1]), toybox._numba_kernel(), raster._numba_kernel()
print(all(k.signatures for k in kernels), sum(sum(k.stats.cache_misses.values()) for k in kernels))'''
    for _ in range(2): said = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert said == ['True', '0']
