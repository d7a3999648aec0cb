"What must be true of the repository as a whole"
import json, re, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
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
