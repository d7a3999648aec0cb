"""Processes that begin with the large libraries imported

torch, diffusers and transformers take up to ten seconds of CPU time to import, and the tests start some hundred processes that need them.
So one process, the zygote, imports them once. Where a test then starts `python -m MODULE ...`, be it the kernel of a page or the command
line, the zygote forks, and the fork runs MODULE. It is a true child of the process that asked, with an exit code, signals and CPU time like
any other: the process between it and the zygote ends at once, and orphans go to the nearest "subreaper" above, which the asking process is.

Whatever is not known to be the same started this way starts in the ordinary way: other commands, a process with limits of its own or with
an environment in which a library might have been imported otherwise, and all of them where this is not Linux or where there is CUDA."""
import atexit, ctypes, gc, inspect, json, os, runpy, signal, socket, struct, subprocess, sys, threading, time
from contextlib import contextmanager

MODULES = 'ipykernel_launcher', 'magic123.cli'
# What the environment may say otherwise: nothing that is imported below has read it by then
FREE = 'CUDA_VISIBLE_DEVICES', 'JPY_PARENT_PID', 'JPY_SESSION_NAME', 'MAGIC123_', 'NUMBA_NUM_THREADS', 'PATH', 'PYTEST_CURRENT_TEST', 'PYTHONIOENCODING', 'TORCHINDUCTOR_CACHE_DIR', 'TORCH_HOME', 'U2NET_HOME'

def preload():
    "Third parties only; none that starts a thread, as pandas does, and none that is told how to behave before it is imported, as numba is"
    import torch, torch._dynamo, torch.utils.checkpoint
    import ipykernel.ipkernel, safetensors.torch, torchmetrics.functional.image, tyro, rich.progress, fastcore.all, fastcore.test
    import fast_simplification, scipy.ndimage, scipy.sparse.csgraph, scipy.spatial, skimage.measure, trimesh, xatlas
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    if torch.cuda.is_available(): sys.exit() # no fork could use it
    assert len(os.listdir('/proc/self/task')) == 1, 'a fork would lack the other threads'

# the process that asks

class Zygote:
    "Started when it is first needed"
    def __init__(self):
        self.process, self.owner, self.lock, self.off = None, os.getpid(), threading.Lock(), not sys.platform.startswith('linux')
        self.cpu = 0. # seconds that its imports took, which every fork is spared
        self.forks = 0

    def open(self):
        PR_SET_CHILD_SUBREAPER = 36
        if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0): raise OSError('not allowed')
        self.env = dict(os.environ)
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(300)
        with theirs: self.process = subprocess.Popen([sys.executable, __file__], stdin=theirs, stdout=subprocess.DEVNULL)
        self.cpu, = receive(self.socket, 'd')

    def fork(self, argv, cwd, env, new_session, fds):
        "The id of a new process, or None if it has to start in the ordinary way"
        if self.off or os.getpid() != self.owner or not os.path.isdir(cwd or '.'): return
        env = {os.fsdecode(k): os.fsdecode(v) for k, v in (os.environ if env is None else env).items()}
        with self.lock:
            try:
                if not self.process: self.open()
                if any(env.get(k) != self.env.get(k) and not k.startswith(FREE) for k in env.keys() | self.env.keys()): return
                wanted = json.dumps(dict(argv=argv[2:], cwd=os.path.abspath(os.fsdecode(cwd or '')), env=env, new_session=new_session, parent=self.owner)).encode()
                socket.send_fds(self.socket, [struct.pack('I', len(wanted))], fds)
                self.socket.sendall(wanted)
                pid, = receive(self.socket, 'I')
            except (OSError, EOFError): self.off = True
            else:
                self.forks += 1
                return pid

    @contextmanager
    def away(self):
        "Meanwhile everything starts in the ordinary way"
        before, self.off = self.off, True
        try: yield
        finally: self.off = before

def receive(sock, form):
    data = sock.recv(struct.calcsize(form), socket.MSG_WAITALL)
    if not data: raise EOFError
    return struct.unpack(form, data)

def install():
    "From now on `subprocess.Popen` knows of the zygote"
    if zygote.off: return
    ordinary = subprocess.Popen._execute_child
    names = inspect.signature(ordinary)
    plain = dict(executable=None, preexec_fn=None, pass_fds=(), close_fds=True, shell=False, restore_signals=True, gid=None, gids=None, uid=None, umask=-1, process_group=-1)
    pipes = 'p2cread', 'p2cwrite', 'c2pread', 'c2pwrite', 'errread', 'errwrite'
    def execute_child(self, *given):
        call, pid = names.bind(self, *given).arguments, None
        argv = [os.fsdecode(a) for a in call['args']] if isinstance(call['args'], (list, tuple)) else []
        if argv[:2] == [sys.executable, '-m'] and argv[2:3] and argv[2] in MODULES and all(call.get(k, v) == v for k, v in plain.items()):
            fds = [i if call[k] < 0 else call[k] for i, k in enumerate(('p2cread', 'c2pwrite', 'errwrite'))]
            pid = zygote.fork(argv, call['cwd'], call['env'], call['start_new_session'], fds)
        if pid is None: return ordinary(self, *given)
        self.pid, self._child_created = pid, True
        self._close_pipe_fds(*(call[k] for k in pipes))
    subprocess.Popen._execute_child = execute_child

zygote = Zygote()

# the zygote

def serve(sock):
    "Fork on demand; return in the fork, with the name of the module that it is to run"
    gc.freeze() # what is here stays, so no fork need look through it
    while True:
        head, fds, *_ = socket.recv_fds(sock, 4, 3)
        if not head: os._exit(0) # nobody is there to ask any more
        wanted = json.loads(sock.recv(struct.unpack('I', head)[0], socket.MSG_WAITALL))
        if between := os.fork(): os.waitpid(between, 0)
        elif os.fork(): os._exit(0)
        else: break
        for fd in fds: os.close(fd)
    while os.getppid() != wanted['parent']: time.sleep(.001)
    for i, fd in enumerate(fds): os.dup2(fd, i), os.close(fd)
    if wanted['new_session']: os.setsid()
    os.chdir(wanted['cwd'])
    os.environ.clear(), os.environ.update(wanted['env'])
    if wanted['argv'][0] == 'ipykernel_launcher': # a kernel tells matplotlib in a variable, which was read before
        sys.modules['matplotlib'].rcParams['backend'] = 'module://matplotlib_inline.backend_inline'
    sys.argv, sys.path[0] = wanted['argv'], wanted['cwd'] # `python -m` looks there first
    asked, _, errors = wanted['env'].get('PYTHONIOENCODING', '').partition(':')
    for i, name in enumerate(('stdin', 'stdout', 'stderr')): # as Python opens them
        old = getattr(sys, name)
        how = 'backslashreplace' if i == 2 else errors or ('strict' if asked else old.errors)
        new = open(i, 'w' if i else 'r', 1 if i == 2 or os.isatty(i) else -1, asked or old.encoding, how, closefd=False)
        setattr(sys, name, new), setattr(sys, f'__{name}__', new)
    sys.modules['numpy'].random.seed() # as torch and random are: not the same numbers in every fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sock.sendall(struct.pack('I', os.getpid()))
    sock.close()
    return sys.argv[0]

def leave():
    "The end of a fork, after all else that is done at exit: Python would take a second to tear down what was imported"
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(code)

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_IGN) # Ctrl+C is for those who asked
    atexit.register(leave) # first in, last out
    sock, code = socket.socket(fileno=os.dup(0)), 1
    preload()
    sock.sendall(struct.pack('d', time.process_time()))
    try: runpy.run_module(serve(sock), run_name='__main__', alter_sys=True)
    except SystemExit as e: code = int(e.code or 0)
    else: code = 0
