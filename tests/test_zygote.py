"A process that is forked is like one that is started"
import json, os, signal, subprocess, sys, time
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from zygote import zygote

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='forks on Linux only')

def kernel(*cells):
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(page, kernel_name='python3', timeout=100).execute()
    return ''.join(o.text for c in page.cells for o in c.outputs if o.output_type == 'stream')

@pytest.fixture
def forked():
    "What the test starts must have been forked, unless there is CUDA"
    before = zygote.forks
    yield
    assert zygote.forks > before or torch.cuda.is_available()

LOOK = '''import json, os, sys, numpy
json.dump(dict(pid=os.getpid(), parent=os.getppid(), cwd=os.getcwd(), here=os.environ.get('MAGIC123_HERE'), all=len(os.environ), threads=len(os.listdir('/proc/self/task')), random=numpy.random.rand(),
    path=sys.path, name=__name__, torch='torch' in sys.modules, ours=[m for m in sys.modules if m.startswith('magic123')]), sys.stdout)'''

def test_kernel(forked):
    "Its own process, our child, with the libraries imported and nothing of ours"
    one, two = (json.loads(kernel(LOOK)) for _ in range(2))
    with zygote.away(): ordinary = json.loads(kernel(LOOK))
    assert one['parent'] == os.getpid() and len({one['pid'], two['pid'], os.getpid()}) == 3 and one['random'] != two['random']
    assert (one['torch'] or torch.cuda.is_available()) and not ordinary['torch'] and not one['ours']
    for same in ('cwd', 'path', 'name', 'all', 'threads'): assert one[same] == ordinary[same], same

def test_kernel_that_breaks_or_dies_is_noticed(forked):
    with pytest.raises(CellExecutionError, match='ZeroDivisionError'): kernel('1/0')
    with pytest.raises(DeadKernelError): kernel('import os, signal; os.kill(os.getpid(), signal.SIGKILL)')

def run(*argv, **more): return subprocess.run([sys.executable, '-m', 'magic123.cli', *argv], capture_output=True, text=True, **more)

def test_command(forked, tmp_path):
    "Exit code, both outputs, folder and environment are the ordinary ones"
    cases = dict(help=['--help'], wrong=['run'], none=['run', 'nowhere.png'], lists=['weights', 'list'])
    env = os.environ | dict(MAGIC123_WEIGHTS=str(tmp_path/'weights'))
    found = {name: run(*argv, cwd=tmp_path, env=env) for name, argv in cases.items()}
    with zygote.away(): wanted = {name: run(*argv, cwd=tmp_path, env=env) for name, argv in cases.items()}
    for name in cases: assert [getattr(found[name], k) for k in ('returncode', 'stdout', 'stderr')] == [getattr(wanted[name], k) for k in ('returncode', 'stdout', 'stderr')], name
    assert found['help'].returncode == 0 and found['wrong'].returncode == 2

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_signals_and_exit_codes(how, forked):
    process = subprocess.Popen([sys.executable, '-m', 'magic123.cli', 'run', '/dev/stdin'], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    assert os.getpgid(process.pid) == process.pid and process.poll() is None
    process.send_signal(how)
    process.stdin.close()
    assert process.wait(100) == -how

def test_what_a_library_may_have_read_starts_the_ordinary_way():
    for env in (dict(HF_HUB_OFFLINE='1'), dict(OMP_NUM_THREADS='3'), dict(TRITON_INTERPRET='1')):
        before = zygote.forks
        assert run('--help', env=os.environ | env).returncode == 0 and zygote.forks == before
    assert run('--help', preexec_fn=lambda: None).returncode == 0 and zygote.forks == before
