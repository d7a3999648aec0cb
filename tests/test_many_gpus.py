"Two processes that share the views of a step make what one process makes of them"
import json, os, random, subprocess, sys, time
from pathlib import Path
import psutil
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

ENV = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

def start(n, *argv):
    several = ['-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n)] if n > 1 else []
    argv = [sys.executable, *several, '-m', 'magic123.cli', *map(str, argv)]
    return subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def finish(process, code=0):
    said = process.communicate(timeout=400)[0]
    assert process.returncode == code, said
    return said

def log(folder): # the last line may be half-written
    path = folder/'log.jsonl'
    return [json.loads(line) for line in path.read_text().split('\n')[:-1]] if path.is_file() else []

def ends(folder): return {stage: load_file(sorted((folder/stage).glob('*.safetensors'))[-1]) for stage in ('coarse', 'fine')}

@pytest.fixture(scope='module')
def recipe(recipe_file, tmp_path_factory):
    "The miniature with two novel views a step, and the photo in every other"
    path, content = tmp_path_factory.mktemp('recipe')/'two.json', json.loads(Path(recipe_file).read_text())
    content['coarse'] |= dict(novel_views=2, reference_interval=2, novel_with_reference=False)
    content['fine'] |= dict(novel_views=2)
    path.write_text(json.dumps(content))
    return path

@pytest.fixture(scope='module')
def one(photo, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')/'run'
    finish(start(1, 'run', photo, '--recipe', recipe, '--out', folder))
    return folder

def same(one, two):
    "The same losses, step by step, and the same scene; a sum of two is the same in either order"
    a, b = log(one), log(two)
    assert [(l['stage'], l['step']) for l in a] == [(l['stage'], l['step']) for l in b]
    for x, y in zip(a, b): assert_close({k: v for k, v in x.items() if k not in ('stage', 'ms')}, {k: v for k, v in y.items() if k not in ('stage', 'ms')}, rtol=1e-4, atol=1e-7)
    assert_close(ends(one), ends(two), rtol=1e-4, atol=1e-5)

def test_two_processes_make_what_one_makes(one, photo, recipe, tmp_path):
    "Asked for one view a step, they take one each"
    said = finish(start(2, 'run', photo, '--recipe', recipe, '--out', tmp_path/'run', '--coarse.novel-views', 1, '--fine.novel-views', 1))
    same(one, tmp_path/'run')
    assert said.count('2 processes: 2 novel views a step') == said.count('Mesh: ') == 1
    for name in ('recipe.json', 'mesh.glb', 'contact_sheet.png', 'turntable.mp4'): assert (tmp_path/'run'/name).is_file()
    recipes = [json.loads((folder/'recipe.json').read_text())['recipe'] for folder in (one, tmp_path/'run')]
    assert recipes[0] == recipes[1]

def test_killed_with_two_and_continued_with_one(one, photo, recipe, tmp_path):
    folder, total = tmp_path/'run', len(log(one))
    process = start(2, 'run', photo, '--recipe', recipe, '--out', folder)
    moment = random.Random(time.time_ns()).randrange(1, total)
    while len(log(folder)) < moment and process.poll() is None: time.sleep(.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    for p in (process, *workers): p.kill() # torchrun's group does not hold them
    process.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, 30)[1]
    assert not (folder/'metrics.json').exists()
    finish(start(1, 'resume', folder))
    same(one, folder)

def test_mistakes_are_told_once(tmp_path, recipe):
    said = finish(start(2, 'run', tmp_path/'none.png', '--recipe', recipe, '--out', tmp_path/'run'), 1)
    assert said.count('There is no file') == 1 and not (tmp_path/'run').exists()

def test_each_process_takes_a_gpu_of_its_own(tmp_path, monkeypatch):
    "Also if the user has named one: `--device cuda:0` is not the same GPU for everybody"
    import torch
    from magic123.image_to_mesh import Job
    from magic123.recipe import Recipe
    asked, job = [], Job(tmp_path, Recipe.preset('quick').replace({'device': 'cuda:0'}), 'toybox:mug:1')
    monkeypatch.setattr(torch, 'zeros', lambda *_, device: asked.append(torch.device(device)) or torch.empty(0, device='meta'))
    monkeypatch.setattr('torch.distributed.is_initialized', lambda: True)
    for rank in (0, 3):
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        job.device
    assert asked == [torch.device('cuda', 0), torch.device('cuda', 3)]

def test_speed_is_measured_together_and_written_once(tmp_path, recipe_file):
    "Asked for one view a step, two processes take one each; what all would do alike the first does"
    content = json.loads(Path(recipe_file).read_text())
    for stage in ('coarse', 'fine'): content[stage] |= dict(weight_2d=0., weight_3d=0.)
    content['nerf'] |= dict(log2_entries=13)
    (tmp_path/'r.json').write_text(json.dumps(content))
    argv = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'magic123.speed', '--device', 'cpu',
        '--part', 'coarse', 'volume', 'scaling', '--recipe', tmp_path/'r.json', '--steps', '4', '--out', tmp_path/'speed.json']
    said = finish(subprocess.Popen(list(map(str, argv)), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    (setting, found), = json.loads((tmp_path/'speed.json').read_text())['settings'].items()
    assert setting == 'cpu graphs 2 processes' and found['coarse']['seconds'] > 0 and said.count('\nvolume: ') + said.startswith('volume: ') == 1
    assert {k for k in found['scaling'] if k.endswith('views')} == {f'{stage} {n} views' for stage in ('coarse', 'fine') for n in (2, 4, 8)}

def test_objects_side_by_side(recipe_file):
    "One object at a time, and two"
    from magic123.recipe import Recipe
    from magic123.speed import measure_objects
    recipe = Recipe.load(recipe_file).replace({f'{stage}.weight_{d}d': 0. for stage in ('coarse', 'fine') for d in (2, 3)} | {'nerf.log2_entries': 13})
    for count in (1, 2):
        found = measure_objects(recipe, 'cpu', count, 4)
        assert set(found) == {'coarse', 'fine'} and min(found.values()) > 0
