"A batch of experiments: whatever happens to its runs, its workers or its user, the table is right"
import json, os, signal, stat, subprocess, sys, threading, time
from pathlib import Path
import nbformat
import numpy as np
import pandas
import psutil
import pytest
import yaml
from conftest import MINIATURE, WITHOUT_PRIORS, lay_photos
from magic123.cli import main
from magic123.experiment import expand, run_grid, work_together

TAKES = '''number: float = 1. # to be doubled
does: str = 'double' # or: fail, die, meet, wait
out: str = ''
'''
DOES = '''import logging, os, signal, time
from pathlib import Path
from magic123.experiment import report
home = Path(out).parent
(Path(out)/'kernel').write_text(str(os.getpid()))
logging.getLogger('tornado.general').error('Traceback: a socket is gone') # as a kernel says that is told to end

def until(true):
    for _ in range(1200):
        if true(): return
        time.sleep(.05)
    raise TimeoutError

if does == 'fail' and (home/'broken').exists(): raise ValueError('a part is broken')
if does == 'die' and not (home/'died').exists():
    (home/'died').write_text('')
    os.kill(os.getpid(), signal.SIGKILL)
if does == 'meet': until(lambda: len(list(home.glob('*/kernel'))) >= 2)
if does == 'wait': until(lambda: (home/'go').exists())
report(out, dict(doubled=2*number, inner=dict(gpu=os.environ.get('CUDA_VISIBLE_DEVICES', ''))))'''

@pytest.fixture(scope='module')
def machine(tmp_path_factory):
    "A notebook that doubles numbers, and can be told to get into trouble"
    cells = [nbformat.v4.new_code_cell(TAKES, metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(DOES)]
    path = tmp_path_factory.mktemp('machine')/'machine.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3'))), path)
    return path

@pytest.fixture
def grid(machine, tmp_path):
    def make(**what):
        path = tmp_path/'grid.yaml'
        path.write_text(yaml.safe_dump(dict(notebook=str(machine)) | what))
        return path
    return make

@pytest.fixture
def shell(capsys):
    def run(*argv):
        code = main(['ablate', *map(str, argv)])
        said = ''.join(capsys.readouterr())
        assert 'Traceback' not in said
        return code, said
    return run

def start(*argv): # in a group of its own, as a terminal would
    return subprocess.Popen([sys.executable, '-m', 'magic123.cli', 'ablate', *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

def until(true, process, seconds=300):
    ends = time.time() + seconds
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < ends, 'it takes too long'
        time.sleep(.02)

def record(folder): return json.loads((folder/'run.json').read_text())
def gone(pid): return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

# what is asked for

@pytest.mark.parametrize('words, what', {
    'there is no parameter numbr: did you mean number?': dict(vary={'numbr': [1]}),
    "number is 'one'; it must be float": dict(vary={'number': [1, 'one']}),
    'takes no settings of a recipe': dict(settings={'coarse.steps': 3}),
    'there is no parameter seed': dict(seeds=[1]),
    'there is no setting seds: did you mean seeds?': dict(seds=[1]),
    'There is no experiment': dict(notebook='71_perpetual_motion'),
    'there is no setting coarse.stps: did you mean coarse.steps?': dict(notebook='70_reconstruct', vary={'coarse.stps': [3]}),
    'coarse.steps is 0; it must be at least 1': dict(notebook='reconstruct', recipes={'none': {'coarse.steps': 0}}),
    "There is no recipe called 'fast'": dict(notebook='reconstruct', recipes=['fast']),
    'No picture matches nowhere': dict(notebook='reconstruct', objects=['nowhere/*.png']),
    'No picture matches nofile.png': dict(notebook='reconstruct', objects=['nofile.png']),
    "no toy family 'mugg'": dict(notebook='reconstruct', objects=['toybox:mugg:3']),
    "'' is not a seed": dict(notebook='two_opinions', vary={'objects': [['toybox:mug']]})}.items())
def test_mistyped(words, what, grid, shell, tmp_path):
    code, said = shell(grid(**what), '--out', tmp_path/'out')
    assert code == 2 and words in said and not (tmp_path/'out').exists()

def test_bad_places(grid, shell, tmp_path, monkeypatch):
    import dask, distributed # whose settings these are
    argv = grid(vary={'number': [1]}), '--out', tmp_path/'out', '--cluster'
    (tmp_path/'bad.yaml').write_text('{cores: 1, memory: 1GB, colour: red}')
    monkeypatch.setenv('PATH', '')
    with dask.config.set({'distributed.comm.timeouts.connect': '500ms'}):
        for where, words in {'moon': "There is no cluster 'moon'", 'gpus': 'no GPU here', f'slurm:{tmp_path}/none.yaml': 'Could not read', '127.0.0.1:9': 'No Dask scheduler answers'}.items():
            code, said = shell(*argv, where)
            assert code == 2 and words in said, said
    for options, words in {'local --workers -3': '--workers is -3', 'local --workers 0': 'must be at least 1', 'gpus --workers -1': '--workers is -1', 'gpus --gpu-memory -2': '--gpu-memory is -2',
            'local --gpu-memory 20': 'Add `--cluster gpus`', '127.0.0.1:9 --workers 2': 'has workers of its own', f'slurm:{tmp_path}/bad.yaml --workers 2': 'Say `jobs` in the SLURM file'}.items():
        code, said = shell(*argv, *options.split())
        assert code == 2 and words in said and not list((tmp_path/'out').glob('*/run.json')), said
    for text, words in {'- cores': 'does not describe SLURM jobs', 'lots of cores': 'does not describe SLURM jobs', 'cores: eight': "cores is 'eight'", 'processes: 0': 'processes is 0', 'jobs: two': "jobs is 'two'"}.items():
        (tmp_path/'worse.yaml').write_text(text)
        code, said = shell(*argv, f'slurm:{tmp_path}/worse.yaml')
        assert code == 2 and words in said, said
    monkeypatch.setitem(sys.modules, 'dask_jobqueue', None)
    assert 'pip install dask-jobqueue' in shell(*argv, f'slurm:{tmp_path}/bad.yaml')[1]

def test_python_and_yaml_agree(grid, tmp_path):
    (tmp_path/'grid.py').write_text(f'lots = [1., 1e-3]\ngrid = dict(notebook={str(yaml.safe_load(grid().read_text())["notebook"])!r}, vary=dict(number=lots))')
    path = grid()
    path.write_text(path.read_text() + 'vary: {number: [1., 1e-3]}')
    names = [[r.folder.name for r in expand(p, tmp_path)] for p in (path, tmp_path/'grid.py')]
    assert names[0] == names[1] and len(set(names[0])) == 2

def test_paths_mean_the_same_from_the_notebooks_folder(tmp_path, monkeypatch):
    from test_cli import disc
    (tmp_path/'photos').mkdir()
    disc().save(tmp_path/'photos'/'disc.png')
    disc().convert('L').save(tmp_path/'far.png')
    (tmp_path/'own.json').write_text(json.dumps(MINIATURE | dict(photo=dict(mask='photos/disc.png'))))
    what = dict(notebook='70_reconstruct', recipes=['own.json'], parameters=dict(image='photos/disc.png'), settings={'photo.depth': 'far.png'})
    def one(): return expand(what, 'out')[0]
    monkeypatch.chdir(tmp_path)
    run = one()
    assert run.parameters['image'] == str(tmp_path/'photos'/'disc.png') and run.parameters['recipe'] == str(tmp_path/'own.json')
    assert run.parameters['settings'] == {'photo.mask': str(tmp_path/'photos'/'disc.png'), 'photo.depth': str(tmp_path/'far.png')}
    disc().rotate(90).convert('L').save(tmp_path/'photos'/'depth.png')
    assert one().folder != run.folder, 'its depth counts, too'

# what becomes of it

def test_failures_deaths_and_cache(grid, shell, tmp_path):
    out = tmp_path/'out'
    out.mkdir()
    (out/'broken').write_text('')
    argv = grid(vary=dict(does=['double', 'fail', 'die'], number=[3])), '--out', out, '--workers', 2
    table = lambda: pandas.read_parquet(out/'table.parquet').set_index('does')
    code, said = shell(*argv)
    assert code == 2 and '1 of 3 runs failed' in said and 'ValueError: a part is broken' in said and '--retry' in said, said
    assert 'Dashboard: http' in said and '2 of 3 runs done, 0 running, 1 failed' in said
    assert table().status.to_dict() == dict(double='finished', fail='failed', die='finished') and table().attempts.to_dict() == dict(double=1, fail=1, die=2)
    assert table().doubled['double'] == 6 and np.isnan(table().doubled['fail']) and 'broken' in table().error['fail']
    stamps = {p: p.stat().st_mtime_ns for p in out.glob('*/run.ipynb')}
    code, said = shell(*argv)
    assert code == 2 and 'Dashboard' not in said and all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    (out/'broken').unlink()
    code, said = shell(*argv, '--retry')
    assert code == 0 and set(table().status) == {'finished'} and table().attempts.to_dict() == dict(double=1, fail=2, die=2)
    assert sum(p.stat().st_mtime_ns == t for p, t in stamps.items()) == 2
    csv = pandas.read_csv(out/'table.csv')
    assert list(csv.doubled) == [6, 6, 6] and list(csv.columns) == list(table().reset_index().columns)

def test_fresh_needs_somebody_to_do_it(grid, shell, tmp_path):
    argv = grid(vary=dict(number=[1])), '--out', tmp_path/'out'
    assert shell(*argv)[0] == 0
    assert shell(*argv, '--fresh', '--workers', '-3')[0] == 2 and len(list((tmp_path/'out').glob('*/metrics.json'))) == 1

def test_lost_numbers_are_computed_again(grid, shell, tmp_path):
    argv = grid(vary=dict(number=[1, 2, 3])), '--out', tmp_path/'out'
    assert shell(*argv)[0] == 0
    one, two, three = sorted((tmp_path/'out').glob('number=*'))
    (one/'metrics.json').unlink()
    (two/'run.json').write_text('')
    (three/'metrics.json').write_text('{')
    assert shell(*argv)[0] == 0
    assert list(pandas.read_csv(tmp_path/'out'/'table.csv').doubled) == [2, 4, 6]

def test_ctrl_c_keeps_what_is_done(grid, shell, tmp_path):
    out = tmp_path/'out'
    out.mkdir()
    argv = grid(vary=dict(does=['double', 'wait'], number=[1, 2])), '--out', out
    process = start(*argv)
    until(lambda: len(list(out.glob('does=wait*/kernel'))) == 1, process)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 130 and 'Stopped: 2 of 4 runs are done' in said and 'Traceback' not in said, said
    assert list(pandas.read_csv(out/'table.csv').status).count('finished') == 2
    pids = [int(p.read_text()) for p in out.glob('*/kernel')]
    ends = time.time() + 10
    while not all(map(gone, pids)) and time.time() < ends: time.sleep(.1)
    assert all(map(gone, pids))
    (out/'go').write_text('')
    code, said = shell(*argv)
    table = pandas.read_csv(out/'table.csv')
    assert code == 0 and list(table.doubled) == [2, 4, 2, 4] and list(table.attempts)[:2] == [1, 1] and sum(table.attempts) == 5

def test_worker_killed_in_the_middle(tmp_path):
    from test_cli import disc
    disc().save(tmp_path/'disc.png')
    recipe = MINIATURE | dict(photo=dict(depth='none'))
    (tmp_path/'miniature.json').write_text(json.dumps(recipe))
    what = dict(notebook='reconstruct', objects=[str(tmp_path/'*.png')], seeds=[1, 2, 3], recipes=[str(tmp_path/'miniature.json')], settings=WITHOUT_PRIORS | {'coarse.t_range': [.1, .9]})
    (tmp_path/'grid.yaml').write_text(yaml.safe_dump(what))
    out = tmp_path/'out'
    process = start(tmp_path/'grid.yaml', '--out', out, '--workers', 2)
    log = lambda: next((p for p in out.glob('*/reconstruction/log.jsonl') if p.read_text().count('\n') >= 6), None)
    until(log, process)
    victim = log().parent.parent
    os.kill(record(victim)['attempts'][-1]['pid'], signal.SIGKILL)
    photo = (victim/'reconstruction'/'reference'/'rgb.png').stat().st_mtime_ns
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    table = pandas.read_parquet(out/'table.parquet')
    attempts = {Path(f).name: n for f, n in zip(table.folder, table.attempts)}
    assert set(table.status) == {'finished'} and list(table.seed) == [1, 2, 3] and table['reference.psnr'].notna().all()
    assert attempts.pop(victim.name) == 2 and set(attempts.values()) == {1}
    assert (victim/'reconstruction'/'reference'/'rgb.png').stat().st_mtime_ns == photo, 'it began again'
    steps = [(l['stage'], l['step']) for l in map(json.loads, open(victim/'reconstruction'/'log.jsonl'))]
    assert steps == [('coarse', i) for i in range(1, 25)] + [('fine', i) for i in range(1, 13)]
    assert all((Path(f)/name).is_file() for f in table.folder for name in ('run.ipynb', 'metrics.json', 'preview.jpg', 'reconstruction/mesh.glb'))

# where it runs

def program(path, text):
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

def test_a_worker_for_each_gpu(machine, tmp_path, monkeypatch):
    program(tmp_path/'nvidia-smi', "echo '0, GPU-aa, 80000, X1'; echo '1, GPU-bb, 80000, X1'")
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    table = run_grid(dict(notebook=str(machine), parameters=dict(does='meet'), vary=dict(number=(1., 2.))), tmp_path/'out', 'gpus')
    assert set(table.status) == {'finished'} and set(table['inner.gpu']) == {'GPU-aa', 'GPU-bb'}

def test_somebody_elses_scheduler(machine, tmp_path):
    from distributed import LocalCluster
    from jupyter_core.utils import ensure_event_loop
    class Board:
        running = []
        def say(self, text): pass
        def show(self, total, done, running, failed, seconds): self.running.append(running)
        def ended(self, run, record, words): pass
    ensure_event_loop() # as after a notebook that this process has run before: two threads must not share its loop
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, protocol='tcp', dashboard_address=None) as cluster:
        table = run_grid(dict(notebook=str(machine), parameters=dict(does='meet'), vary=dict(number=(1., 2.))), tmp_path/'out', cluster.scheduler_address, board=Board())
    assert list(table.doubled) == [2, 4] and Board.running[0] == 2, 'each of its threads does a run'

def test_scheduler_that_dies(grid, shell, tmp_path):
    code = f"""
import time
from distributed import LocalCluster
with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, protocol='tcp', dashboard_address=None) as cluster:
    open({str(tmp_path/'address')!r}, 'w').write(cluster.scheduler_address)
    time.sleep(600)"""
    scheduler = subprocess.Popen([sys.executable, '-c', code])
    until(lambda: (tmp_path/'address').is_file() and (tmp_path/'address').read_text(), scheduler)
    out = tmp_path/'out'
    def kill():
        until(lambda: list(out.glob('*/kernel')), scheduler)
        scheduler.kill()
    killer = threading.Thread(target=kill)
    killer.start()
    code, said = shell(grid(vary=dict(does=['wait'], number=[1, 2, 3])), '--out', out, '--cluster', (tmp_path/'address').read_text())
    killer.join()
    (out/'go').write_text('')
    assert code == 2 and 'The Dask scheduler is gone' in said, said
    assert set(pandas.read_csv(out/'table.csv').status) <= {'waiting', 'running'}

def test_jobs_of_slurm(machine, tmp_path, monkeypatch):
    "`sbatch` stands for a cluster with one node, which is this one"
    pytest.importorskip('dask_jobqueue')
    program(tmp_path/'sbatch', f'cp "$1" {tmp_path}/job.sh; setsid sh {tmp_path}/job.sh > {tmp_path}/job.log 2>&1 & echo Submitted batch job $!')
    program(tmp_path/'scancel', 'kill -- -$1')
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    (tmp_path/'conf.yaml').write_text("{queue: gpu, cores: 2, memory: 2GB, interface: lo, job_extra_directives: ['--gres=gpu:1']}")
    table = run_grid(dict(notebook=str(machine), vary=dict(number=(1., 2.))), tmp_path/'out', f'slurm:{tmp_path}/conf.yaml')
    assert list(table.doubled) == [2, 4], (tmp_path/'job.log').read_text()
    job = (tmp_path/'job.sh').read_text()
    assert all(w in job for w in ('#SBATCH -p gpu', '--cpus-per-task=2', '--gres=gpu:1', '--nthreads 1', 'OMP_NUM_THREADS=2'))

# rows, where there is little but torch

def test_rows_shared_killed_and_taken_up(tmp_path):
    from test_cli import disc
    disc().save(tmp_path/'disc.png')
    (tmp_path/'miniature.json').write_text(json.dumps(MINIATURE | dict(photo=dict(depth='none'))))
    what = dict(objects=[str(tmp_path/'disc.png')], seeds=[1, 2, 3, 4], recipes=[str(tmp_path/'miniature.json')], settings=WITHOUT_PRIORS | {'export.formats': []})
    (tmp_path/'discs.yaml').write_text(yaml.safe_dump(what))
    python = [sys.executable, '-m', 'magic123.experiment']
    printed = subprocess.run([*python, 'expand', str(tmp_path/'discs.yaml')], capture_output=True, text=True, check=True).stdout
    (tmp_path/'jobs.json').write_text(printed)
    out, claims = tmp_path/'rows.jsonl', tmp_path/'claims'
    (tmp_path/'sitecustomize.py').write_text("import sys\nsys.modules.update(dict.fromkeys(['pandas', 'papermill', 'dask', 'distributed', 'IPython', 'nbformat']))")
    bare = os.environ | dict(PYTHONPATH=f'{tmp_path}:{Path.cwd()}')
    command = [*python, 'rows', str(tmp_path/'jobs.json'), '--claim', str(claims), '--out', str(out), '--pictures', str(tmp_path/'strips')]
    first, second = (subprocess.Popen(command, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2))
    until(lambda: len(list(claims.glob('*.lock'))) >= 2, first)
    first.kill()
    assert second.wait(timeout=300) == 0, second.communicate()[0]
    assert 'ModuleNotFound' not in second.communicate()[0]
    subprocess.run(command + ['--processes', '2'], env=bare, check=True, timeout=300)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(r['seed'] for r in rows) == [1, 2, 3, 4] and not any('error' in r for r in rows), rows
    assert {f'{r["name"]}.jpg' for r in rows} == {p.name for p in (tmp_path/'strips').iterdir()}
    stamp = out.stat().st_mtime_ns
    subprocess.run(command + ['--until', '0'], env=bare, check=True, timeout=300)
    assert out.stat().st_mtime_ns == stamp

def test_workers_that_fail_are_not_kept_quiet(tmp_path, capfd):
    argv = ['rows', str(tmp_path/'none.json'), '--claim', str(tmp_path/'claims'), '--out', str(tmp_path/'rows.jsonl')]
    with pytest.raises(SystemExit, match=r'2 of 2 workers failed; their exit codes are \[1, 1\]'): work_together(2, argv)
    work_together(2, argv, until=time.time() - 20) # out of time at once: being killed is no failure

def test_shipped_grids_expand(tmp_path, monkeypatch):
    from magic123.experiment import _pages, jobs, read_grid
    from magic123.show import data_folder
    from magic123.tiny_priors import split_words
    monkeypatch.chdir(tmp_path) # where the photos are that a grid names
    tokens = {o['content'] for o in json.loads((data_folder()/'priors'/'tiny'/'stable_diffusion'/'tokenizer'/'tokenizer.json').read_text())['added_tokens']}
    for path in sorted((_pages()/'grids').glob('*.yaml')):
        grid = read_grid(path)
        photos, made = lay_photos(path, tmp_path), jobs(path)
        assert len(made) > 1 and set(grid.seeds) == {j['recipe']['seed'] if 'recipe' in j else j['parameters']['seed'] for j in made}, path
        assert len(grid.seeds) == 3 and len(grid.objects) > 1, path
        told = {j['recipe']['prompt']['text'] for j in made if 'recipe' in j} - {None}
        assert all({*split_words(text)} <= tokens for text in told) and (len(told) == 11 if photos else not told), path

def test_two_batches_on_one_scheduler_do_not_share_their_runs(grid, tmp_path):
    from distributed import LocalCluster
    path, homes = grid(vary=dict(does=['wait'], number=[1, 2])), [tmp_path/'a', tmp_path/'b']
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, protocol='tcp', dashboard_address=None) as cluster:
        both = [threading.Thread(target=run_grid, args=(path, home, cluster.scheduler_address)) for home in homes]
        for b in both: b.start()
        ends = time.time() + 200
        while len(list(tmp_path.glob('?/*/kernel'))) < 2 or not all(home.is_dir() for home in homes):
            assert time.time() < ends, 'it takes too long'
            time.sleep(.1)
        time.sleep(2) # both have asked
        for home in homes: (home/'go').touch()
        for b in both: b.join(200)
    for home in homes: assert list(pandas.read_csv(home/'table.csv').doubled) == [2, 4]

def test_a_page_is_a_job_and_its_table_is_kept(grid, shell, tmp_path, monkeypatch):
    from magic123.experiment import jobs, load_results, take
    from magic123.experiment import main as rows
    path = grid(vary=dict(number=[1, 2]))
    made = jobs(path)
    assert [take(j)['doubled'] for j in made] == [2, 4]
    assert shell(path, '--out', tmp_path/'out')[0] == 0
    (tmp_path/'data').mkdir()
    monkeypatch.setenv('MAGIC123_DATA', str(tmp_path/'data'))
    rows(['keep', 'numbers', str(tmp_path/'out'/'table.parquet'), '--about', 'gpu=none'])
    found = load_results('numbers')
    assert list(found.table.doubled) == [2, 4] and found.about['runs'] == 2 and found.about['failed'] == 0

def test_a_page_that_shows_things_is_a_job_where_nothing_can(machine, tmp_path, monkeypatch):
    from magic123.experiment import jobs, take
    page = nbformat.read(machine, 4)
    page.cells.insert(0, nbformat.v4.new_code_cell('from IPython.display import Markdown, display\ndisplay(Markdown("numbers"))'))
    nbformat.write(page, tmp_path/'page.ipynb')
    job, = jobs(dict(notebook=str(tmp_path/'page.ipynb'), parameters=dict(number=4.)))
    for name in ('IPython', 'IPython.display'): monkeypatch.setitem(sys.modules, name, None)
    assert take(job)['doubled'] == 8
