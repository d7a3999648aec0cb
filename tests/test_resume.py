"Killed at any moment and continued, a run ends in the same bits"
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest

ENV = os.environ | dict(OMP_NUM_THREADS='1')

def start(*argv): return subprocess.Popen([sys.executable, '-m', 'magic123.cli', *argv], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
def lines(folder): return (folder/'log.jsonl').read_text().count('\n') if (folder/'log.jsonl').is_file() else 0

def stop_at(process, folder, line, how):
    "Wait for a line of the log, then send a signal"
    while lines(folder) < line and process.poll() is None: time.sleep(.005)
    assert process.poll() is None, process.stdout.read()
    process.send_signal(how)
    return process.communicate(timeout=120)[0]

def finish(process):
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said

def same(one, two):
    for stage in ('coarse', 'fine'):
        a, b = (sorted((folder/stage).glob('*.safetensors'))[-1] for folder in (one, two))
        assert a.name == b.name and a.read_bytes() == b.read_bytes(), stage
    assert (one/'mesh.glb').read_bytes() == (two/'mesh.glb').read_bytes()

@pytest.fixture(scope='module')
def whole(photo, recipe_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')/'run'
    finish(start('run', photo, '--recipe', recipe_file, '--out', str(folder)))
    return folder

def test_kill_9_at_three_random_moments(whole, photo, recipe_file, tmp_path):
    folder, total = tmp_path/'run', lines(whole)
    moments = sorted(random.Random(time.time_ns()).sample(range(1, total), 3))
    argv = 'run', photo, '--recipe', recipe_file, '--out', str(folder)
    for moment in moments:
        process = start(*argv)
        stop_at(process, folder, moment, signal.SIGKILL)
        assert not (folder/'metrics.json').exists()
        argv = 'resume', str(folder)
    finish(start(*argv))
    same(whole, folder)
    steps = [(l['stage'], l['step']) for l in map(json.loads, open(folder/'log.jsonl'))]
    assert steps == [(l['stage'], l['step']) for l in map(json.loads, open(whole/'log.jsonl'))], moments

def test_one_process_a_run(whole, photo, recipe_file, tmp_path):
    folder = tmp_path/'run'
    process = start('run', photo, '--recipe', recipe_file, '--out', str(folder))
    while lines(folder) < 5 and process.poll() is None: time.sleep(.005)
    process.send_signal(signal.SIGSTOP)
    second = start('resume', str(folder))
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 2 and 'Another process is working on' in said, said
    process.send_signal(signal.SIGKILL) # whatever it had locked is free
    process.communicate(timeout=120)
    finish(start('resume', str(folder)))
    same(whole, folder)

def test_ctrl_c_says_how_to_continue_even_without_the_log(whole, photo, recipe_file, tmp_path):
    folder = tmp_path/'run'
    process = start('run', photo, '--recipe', recipe_file, '--out', str(folder))
    said = stop_at(process, folder, 10, signal.SIGINT)
    assert process.returncode == 130, said
    assert f'magic123 resume {folder}' in said and 'Traceback' not in said
    (folder/'log.jsonl').unlink() # and a lost log begins anew
    finish(start('resume', str(folder)))
    same(whole, folder)
    assert json.loads(open(folder/'log.jsonl').readline())['step'] > 1
