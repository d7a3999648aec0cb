"Weights from where they are published to where they are used: a hub on this machine, checkpoints of every kind, and little memory"
import json, os, subprocess, sys, threading
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from conftest import MINIATURE, WITHOUT_PRIORS
from magic123 import stable_diffusion, weights, zero123
from magic123.cameras import Camera
from magic123.cli import main
from magic123.show import UserError

REAL_EMBEDS = sorted(Path(__file__).parents[2].glob('shared/data/*/*/learned_embeds.bin'))

# a hub of our own

class Hub(BaseHTTPRequestHandler):
    "What huggingface_hub asks for, from folders `root/owner/name`; `broken` files end in the middle, once"
    def __init__(self, root, asked, broken, *args): self.root, self.asked, self.broken = root, asked, broken; super().__init__(*args)
    def log_message(self, *_): pass

    def answer(self, body=b'', status=200, **headers):
        self.send_response(status)
        for k, v in {'Content-Length': len(body), **{k.replace('_', '-'): v for k, v in headers.items()}}.items(): self.send_header(k, str(v))
        self.end_headers()
        if self.command == 'GET': self.wfile.write(body)

    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        path = self.path.partition('?')[0].strip('/').split('/')
        if path[:2] == ['api', 'models']: return self.listing('/'.join(path[2:4]), *(path[4:] + ['revision', 'main'][len(path[4:]):])[:2])
        repo, file = '/'.join(path[:2]), self.root.joinpath(*path[:2], *path[4:])
        if not file.is_file(): return self.answer(status=404, X_Error_Code='EntryNotFound')
        data, start = file.read_bytes(), int((self.headers.get('Range') or 'bytes=0-')[6:].partition('-')[0])
        head = dict(ETag=f'"{sha256(data).hexdigest()}"', X_Repo_Commit=commit_of(repo, path[3]), Accept_Ranges='bytes')
        if self.command == 'HEAD': return self.answer(**head, Content_Length=len(data))
        self.asked.append((repo, '/'.join(path[4:]), start))
        if start and start >= len(data): return self.answer(status=416, Content_Range=f'bytes */{len(data)}')
        if file.name in self.broken:
            self.broken.remove(file.name)
            return self.answer(data[:len(data)//2], **head, Content_Length=len(data)) or self.connection.close()
        self.answer(data[start:], 206 if start else 200, **head, **({'Content_Range': f'bytes {start}-{len(data) - 1}/{len(data)}'} if start else {}))

    def listing(self, repo, what, revision):
        home = self.root/repo
        if not home.is_dir(): return self.answer(b'{"error": "Repository not found"}', 404, X_Error_Code='RepoNotFound')
        files = sorted(f for f in home.rglob('*') if f.is_file())
        name = lambda f: str(f.relative_to(home))
        if what == 'tree': found = [dict(type='file', path=name(f), size=f.stat().st_size, oid='0'*40) for f in files]
        else: found = dict(id=repo, modelId=repo, sha=commit_of(repo, revision), siblings=[dict(rfilename=name(f)) for f in files])
        self.answer(json.dumps(found).encode(), Content_Type='application/json')

def commit_of(repo, revision='main'): return revision if len(revision) == 40 else sha256(repo.encode()).hexdigest()[:40]

def pickled(home):
    from safetensors.torch import load_file
    for f in list(home.rglob('*.safetensors')):
        torch.save(load_file(f), f.with_name('diffusion_pytorch_model.bin' if 'diffusion' in f.name else 'pytorch_model.bin'))
        f.unlink()
    return home

@pytest.fixture
def hub(tmp_path):
    "A server on this machine, and a way to run Python that knows no other hub"
    asked, broken = [], []
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Hub, tmp_path/'hub', asked, broken))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if 'PROXY' not in k.upper()} | dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(tmp_path/'hf'),
        HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0', MAGIC123_WEIGHTS=str(tmp_path/'weights'), U2NET_HOME=str(tmp_path/'u2net'), TORCH_HOME=str(tmp_path/'torch'))
    def run(*argv, **more): return subprocess.run([sys.executable, '-m', 'magic123.cli', *argv], env=env | more, capture_output=True, text=True, timeout=280)
    def python(code): return subprocess.run([sys.executable, '-c', f'from magic123 import weights; from dataclasses import replace; {code}'], env=env, capture_output=True, text=True, timeout=280)
    yield SimpleNamespace(root=tmp_path/'hub', asked=asked, broken=broken, run=run, python=python, stop=lambda: (server.shutdown(), server.server_close()), env=env, tmp=tmp_path)
    server.shutdown()

def publish(hub, repo, make):
    "Put a random miniature on the hub"
    home = make(hub.tmp/repo.replace('/', '-'))
    (hub.root/repo).parent.mkdir(parents=True, exist_ok=True)
    home.rename(hub.root/repo)
    if not (hub.root/repo/'vae').exists(): (home.parent/'vae').rename(hub.root/repo/'vae')
    return hub.root/repo

def spoil(file):
    "Change a byte in the middle; what undoes it is returned"
    file, data = file.resolve(), file.read_bytes()
    file.chmod(0o644), file.write_bytes(data[:len(data)//2] + bytes([data[len(data)//2] ^ 1]) + data[len(data)//2 + 1:])
    return lambda: file.write_bytes(data)

def several_files(unet, variant=''):
    "A UNet's file cut up into several, as libraries publish large models: their names"
    from diffusers import UNet2DConditionModel
    model = stable_diffusion.load_part(UNet2DConditionModel, unet)
    (unet/'diffusion_pytorch_model.safetensors').unlink()
    model.half().save_pretrained(unet, max_shard_size='60KB', variant=variant or None)
    return sorted(f.name for f in unet.glob('*-of-*.safetensors'))

def test_fetch_verify_list(hub):
    "Fetched once, broken off and gone on with, converted, locked, verified, used without a connection; a changed byte is found"
    repo = pickled(publish(hub, 'kxic/zero123-105000', zero123.tiny_random))
    encoder = repo/'image_encoder'/'pytorch_model.bin' # as large as it takes for something to have been kept when it breaks off
    torch.save(torch.load(encoder) | {'vision_model.embeddings.position_ids': torch.zeros(4_000_000, dtype=torch.long)}, encoder)
    hub.broken.append(encoder.name)
    (repo/'README.md').write_text('what nobody asks for')
    got = hub.run('weights', 'fetch', 'zero123-105000')
    assert got.returncode == 0, got.stdout + got.stderr
    again = [start for _, file, start in hub.asked if file == 'image_encoder/pytorch_model.bin']
    assert len(again) == 2 and 0 < again[1] < encoder.stat().st_size
    locked = json.loads((hub.tmp/'weights'/'weights.lock.json').read_text())['zero123-105000']
    assert locked['commit'] == commit_of('kxic/zero123-105000') and locked['licence'] == 'MIT'
    assert locked['files']['unet/diffusion_pytorch_model.bin']['sha256'] == sha256((repo/'unet'/'diffusion_pytorch_model.bin').read_bytes()).hexdigest()

    hub.stop()
    assert hub.run('weights', 'verify').returncode == 0
    shown = hub.run('weights', 'list')
    assert shown.returncode == 0 and all(name in shown.stdout for name in weights.SOURCES) and 'CreativeML OpenRAIL-M' in shown.stdout
    from magic123.zero123 import ZERO123_PARTS
    code = f'from magic123.stable_diffusion import find_folder; print(find_folder("kxic/zero123-105000", {ZERO123_PARTS!r}))'
    found = subprocess.run([sys.executable, '-c', code], env=hub.env, capture_output=True, text=True).stdout.strip()
    assert Path(found).name.startswith('zero123-105000-') and not list(Path(found).rglob('*.bin'))

    lies = Path(found)/'unet'/'diffusion_pytorch_model.safetensors'
    spoil(lies)
    for names in ((), ('zero123-105000',)):
        bad = hub.run('weights', 'verify', *names)
        assert bad.returncode == 2 and f'{lies} has changed' in bad.stdout
    lies.unlink()
    assert hub.run('weights', 'fetch', 'zero123-105000').returncode == hub.run('weights', 'verify', 'zero123-105000').returncode == 0 and lies.is_file()

    spoil(next((hub.tmp/'hf').rglob('snapshots/*/unet/*.bin')))
    bad = hub.run('weights', 'verify')
    assert bad.returncode == 2 and 'diffusion_pytorch_model.bin has changed' in bad.stdout + bad.stderr

def test_single_checkpoint_is_verified(hub):
    "'owner/name/file.ckpt': the file is locked and so is what it was converted to, fetched or found"
    (hub.root/'someone'/'zero').mkdir(parents=True)
    weights.tiny_checkpoint(hub.root/'someone'/'zero'/'105000.ckpt')
    place, lock = 'someone/zero/105000.ckpt', hub.tmp/'weights'/'weights.lock.json'
    got = hub.run('weights', 'fetch', place)
    assert got.returncode == 0, got.stdout + got.stderr
    home, locked = Path(got.stdout.split(': ')[-1].strip()), json.loads(lock.read_text())
    assert locked.keys() == {place, home.name} and locked[place]['files'].keys() == {'105000.ckpt'} and locked[place]['place'] == 'someone/zero'
    assert locked[place]['files']['105000.ckpt']['sha256'] == sha256((hub.root/'someone'/'zero'/'105000.ckpt').read_bytes()).hexdigest()
    assert locked[home.name]['files'].keys() == {str(f.relative_to(home)) for f in home.rglob('*') if f.is_file()}

    hub.stop(), lock.unlink()
    assert hub.run('weights', 'fetch', place).returncode == 0 and json.loads(lock.read_text()) == locked
    assert hub.run('weights', 'verify', place).returncode == 0
    for lies in (home/'vae'/'diffusion_pytorch_model.safetensors', next((hub.tmp/'hf').rglob('snapshots/*/105000.ckpt'))):
        mend = spoil(lies)
        bad = hub.run('weights', 'verify', place)
        assert bad.returncode == 2 and f'{lies} has changed' in bad.stdout and bad.stdout.count('has changed') == 1
        mend()

@pytest.mark.parametrize('variant', ['', 'fp16'])
def test_broken_off_between_two_files(hub, variant):
    "Some of a model's files are here: which are not is said, and only they are fetched"
    repo = publish(hub, 'someone/large', stable_diffusion.tiny_random)
    shards = several_files(repo/'unet', variant)
    got = hub.run('weights', 'fetch', 'someone/large')
    assert got.returncode == 0, got.stdout + got.stderr
    snapshot = next((hub.tmp/'hf').rglob('snapshots/*/unet')).parent
    for shard in (shards[1], shards[-1]): (snapshot/'unet'/shard).resolve().unlink(), (snapshot/'unet'/shard).unlink()
    hub.asked.clear()
    alone = hub.run('weights', 'fetch', 'someone/large', HF_HUB_OFFLINE='1')
    assert alone.returncode == 2 and f'lacks unet/{shards[1]} and 1 more' in ' '.join(alone.stderr.split()) and not hub.asked
    got = hub.run('weights', 'fetch', 'someone/large')
    assert got.returncode == 0, got.stdout + got.stderr
    assert sorted(file for _, file, _ in hub.asked) == [f'unet/{shards[1]}', f'unet/{shards[-1]}']
    hub.stop()
    assert hub.run('weights', 'fetch', 'someone/large').returncode == hub.run('weights', 'verify', 'someone/large').returncode == 0

def test_mirror_is_trusted_for_its_fingerprint_only(hub):
    "The first place is gone; the mirror's files are not those that are known, so they are refused and removed"
    publish(hub, 'genai-archive/stable-diffusion-v1-5', stable_diffusion.tiny_random)
    got = hub.run('weights', 'fetch', 'stable-diffusion-1.5')
    assert got.returncode == 2 and not (hub.tmp/'weights'/'weights.lock.json').exists()
    assert any(repo == 'genai-archive/stable-diffusion-v1-5' for repo, _, _ in hub.asked)
    assert 'is not the file that it should be' in got.stderr and list((hub.tmp/'hf').rglob('unet/config.json')) and not list((hub.tmp/'hf').rglob('text_encoder/*.safetensors'))

def test_mirror_without_known_fingerprint(hub):
    "The lock file says which of the places it was, also when the files were here before it"
    publish(hub, 'kxic/zero123-xl', zero123.tiny_random)
    lock = hub.tmp/'weights'/'weights.lock.json'
    for _ in range(2):
        got = hub.run('weights', 'fetch', 'zero123-xl')
        assert got.returncode == 0, got.stdout + got.stderr
        assert json.loads(lock.read_text())['zero123-xl']['place'] == 'kxic/zero123-xl'
        lock.unlink()

def test_a_run_does_not_trust_what_it_finds(hub):
    "A mirror's snapshot that nobody has fetched through us, with other files than those that are known"
    publish(hub, 'botp/stable-diffusion-v1-5', stable_diffusion.tiny_random)
    code = 'from huggingface_hub import snapshot_download; snapshot_download("botp/stable-diffusion-v1-5")'
    assert subprocess.run([sys.executable, '-c', code], env=hub.env, capture_output=True).returncode == 0
    got = hub.run('run', 'toybox:mug:900003', '--priors.stable-diffusion', 'stable-diffusion-v1-5/stable-diffusion-v1-5', '--out', str(hub.tmp/'out'))
    assert got.returncode == 2 and 'botp/stable-diffusion-v1-5: text_encoder/model.safetensors is not the file that it should be' in ' '.join(got.stderr.split())

def test_offline_says_what_to_do(hub):
    hub.stop()
    for more in ({}, dict(HF_HUB_OFFLINE='1')):
        got = hub.run('weights', 'fetch', 'stable-diffusion-1.5', **more)
        assert got.returncode == 2 and 'is not on this machine' in got.stderr and 'magic123 weights fetch stable-diffusion-1.5' in ' '.join(got.stderr.split()) and not any(word in got.stderr for word in ('Traceback', 'Retrying'))

def test_offline_asks_nobody(hub, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1'), monkeypatch.setenv('U2NET_HOME', str(hub.tmp/'u2net'))
    monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: pytest.fail('somebody was asked'))
    with pytest.raises(UserError, match='HF_HUB_OFFLINE is set'): weights.fetch('cutout')

def test_depth_and_cutout_lie_where_they_are_looked_for(hub, monkeypatch):
    "What `weights fetch` brings is what `preprocess` finds"
    import importlib.util
    home = hub.root/'Intel'/'dpt-beit-large-512'
    home.mkdir(parents=True)
    for name in weights.SOURCES['depth'].files: (home/name).write_text('{}')
    found = 'from magic123.preprocess import local_depth_model; print(local_depth_model("dpt"))'
    strange = hub.run('weights', 'fetch', 'depth')
    assert strange.returncode == 2 and 'model.safetensors is not the file that it should be' in strange.stderr and hub.python(found).stdout.strip() == 'None'
    trusted = 'weights.SOURCES["depth"] = replace(weights.SOURCES["depth"], sha256={}); weights.fetch("depth"); '
    assert hub.python(trusted + found).stdout.strip() == hub.python(found).stdout.strip() == 'Intel/dpt-beit-large-512'

    monkeypatch.setenv('U2NET_HOME', str(hub.tmp/'u2net'))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name in ('rembg', 'onnxruntime') or None)
    from magic123.preprocess import local_rembg_model
    assert local_rembg_model() is None and weights.on_disk('cutout') is None
    weights.fetch_url((home/'config.json').as_uri(), hub.tmp/'u2net'/'isnet-general-use.onnx')
    assert local_rembg_model() == 'isnet-general-use' and weights.on_disk('cutout') == hub.tmp/'u2net'
    monkeypatch.setenv('MAGIC123_WEIGHTS', str(hub.tmp/'weights'))
    with pytest.raises(UserError, match='is not the file that it should be'): weights.fetch('cutout')
    assert (hub.tmp/'u2net'/'isnet-general-use.onnx').exists()

def test_judges_find_what_is_fetched(hub):
    "CLIP in several files beside OpenCLIP's, of which only the former come; AlexNet in torch's folder; both are used from where they lie, without a connection"
    from transformers import CLIPConfig, CLIPModel
    from magic123.perceptual import CLIP, LPIPS, ClipEyes
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    home = hub.root/CLIP
    CLIPModel(CLIPConfig(text_config=small | dict(vocab_size=64), vision_config=small | dict(image_size=32, patch_size=16), projection_dim=24)).save_pretrained(home, max_shard_size='20KB')
    wanted = {f'{CLIP}: {f.name}' for f in home.iterdir()}
    for name in ('open_clip_model.safetensors', 'open_clip_config.json', 'pytorch_model-00001-of-00001.bin', 'pytorch_model.bin.index.json', 'vocab.json'): (home/name).write_text('{}')
    assert hub.run('weights', 'fetch', 'clip').returncode == 0 and {f'{repo}: {file}' for repo, file, _ in hub.asked} == wanted and len(wanted) > 4
    torch.manual_seed(0)
    torch.save({f'features.{k}.{name}': t for k, layer in LPIPS().features.items() for name, t in layer.state_dict().items()}, hub.tmp/'alexnet.pth')
    given = f'import shutil; weights.fetch_url = lambda url, path: (path.parent.mkdir(parents=True), shutil.copy({str(hub.tmp/"alexnet.pth")!r}, path)); '
    assert 'is not the file that it should be' in hub.python(given + 'weights.fetch("lpips")').stderr
    trusted = hub.python(given.replace('(parents=True)', '(exist_ok=True)') + 'weights.SOURCES["lpips"] = replace(weights.SOURCES["lpips"], sha256={}); weights.fetch("lpips")')
    assert trusted.returncode == 0, trusted.stderr
    hub.stop()
    seen = hub.python('import torch; from magic123.perceptual import find_judges; judges, x = find_judges(), torch.linspace(0, 1, 64*64*3).view(64, 64, 3); print(judges.lpips(x, 1 - x) > 0, *judges.clip(x)[:4].tolist())')
    assert seen.returncode == 0 and (said := seen.stdout.split())[0] == 'True', seen.stdout + seen.stderr
    torch.testing.assert_close(torch.tensor([*map(float, said[1:])]), ClipEyes.load(home)(torch.linspace(0, 1, 64*64*3).view(64, 64, 3))[:4], atol=1e-5, rtol=1e-4)

def test_a_conversion_that_is_no_mirror(hub):
    "threestudio's Zero-1-to-3 is had by its own name, and does not stand in for the paper's"
    repo = publish(hub, 'bennyguo/zero123-diffusers', zero123.tiny_random)
    (repo/'cc_projection').rename(repo/'clip_camera_projection')
    for f in [*repo.rglob('*.safetensors')]: f.rename(f.with_name(f.name.replace('.safetensors', '.fp16_ema.safetensors')))
    assert hub.run('weights', 'fetch', 'bennyguo/zero123-diffusers').returncode == 0
    hub.stop()
    code = 'from magic123.zero123 import ZERO123_PARTS; from magic123.stable_diffusion import find_folder; print(find_folder("bennyguo/zero123-diffusers", ZERO123_PARTS).parts[-3:], weights.on_disk("zero123-105000"))'
    found = hub.python(code)
    assert found.stdout.split()[0] == "('models--bennyguo--zero123-diffusers'," and found.stdout.split()[-1] == 'None', found.stdout + found.stderr

def test_stopped_before_the_last_byte_and_after_it(hub, monkeypatch):
    "Killed half-way, a download goes on; killed before the file got its name, it ends too"
    monkeypatch.setenv('no_proxy', '*')
    home, path = hub.root/'some'/'one', hub.tmp/'here'/'net.onnx'
    home.mkdir(parents=True), path.parent.mkdir()
    (home/'net.onnx').write_bytes(os.urandom(1000))
    for have, asked in ((600, [600]), (1000, [1000, 0]), (1200, [1200, 0])):
        path.with_name('net.onnx.part').write_bytes((home/'net.onnx').read_bytes()[:have].ljust(have))
        weights.fetch_url(f'{hub.env["HF_ENDPOINT"]}/some/one/resolve/main/net.onnx', path)
        assert path.read_bytes() == (home/'net.onnx').read_bytes() and [start for *_, start in hub.asked] == asked
        hub.asked.clear(), path.unlink()

# checkpoints in a recipe

def test_a_run_from_checkpoints(tmp_path, monkeypatch):
    "Both priors as single files, as they are published, through `magic123 run`"
    monkeypatch.setenv('MAGIC123_WEIGHTS', str(tmp_path/'home'))
    weights.tiny_checkpoint(tmp_path/'sd'/'v1-5-pruned-emaonly.safetensors', 'sd1')
    weights.tiny_checkpoint(tmp_path/'stable_zero123.ckpt', 'zero123', average=1.)
    recipe = MINIATURE | dict(priors=dict(stable_diffusion=str(tmp_path/'sd'/'v1-5-pruned-emaonly.safetensors'), zero123=str(tmp_path/'stable_zero123.ckpt')),
        prompt=dict(text='a red mug'), coarse=MINIATURE['coarse'] | dict(steps=2), fine=MINIATURE['fine'] | dict(steps=1))
    (tmp_path/'r.json').write_text(json.dumps(recipe))
    assert main(['run', 'toybox:mug:900003', '--recipe', str(tmp_path/'r.json'), '--out', str(tmp_path/'out')]) == 0
    said = json.loads((tmp_path/'out'/'recipe.json').read_text())
    assert {'unet/diffusion_pytorch_model.safetensors', 'vae/diffusion_pytorch_model.safetensors'} <= said['weights']['2d'].keys() & said['weights']['3d'].keys()

def test_trap_in_a_recipe(tmp_path, monkeypatch, capsys):
    class Trap:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/sprung',)
    monkeypatch.setenv('MAGIC123_WEIGHTS', str(tmp_path/'home'))
    torch.save(dict(state_dict={}, callbacks=Trap()), tmp_path/'zero123.ckpt')
    (tmp_path/'r.json').write_text(json.dumps(MINIATURE))
    code = main(['run', 'toybox:mug:900003', '--recipe', str(tmp_path/'r.json'), '--priors.zero123', str(tmp_path/'zero123.ckpt'), '--coarse.weight-2d', '0', '--fine.weight-2d', '0', '--out', str(tmp_path/'out')])
    assert code == 2 and 'system when it is opened' in ' '.join(capsys.readouterr().err.split())
    assert not (tmp_path/'sprung').exists() and not (tmp_path/'out').exists()

@pytest.mark.parametrize('kind', ['fp16', 'fp16_ema'])
def test_half_precision_variants(tmp_path, kind):
    "Folders with `model.fp16.safetensors` only, as published, give what the whole ones give"
    home = zero123.tiny_random(tmp_path)
    reference = SimpleNamespace(rgb=torch.rand(32, 32, 3), camera=Camera.orbit())
    wanted = zero123.Zero123Prior.load(home, reference, device='cpu')
    for f in [*tmp_path.rglob('*.safetensors')]: f.rename(f.with_name(f.name.replace('.safetensors', f'.{kind}.safetensors')))
    found = zero123.Zero123Prior.load(home, reference, device='cpu')
    torch.testing.assert_close(found.diffusion.unet.state_dict(), wanted.diffusion.unet.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(found.thought, wanted.thought, rtol=0, atol=0)

@pytest.mark.parametrize('pickles', [False, True])
def test_weights_without_a_place(tmp_path, monkeypatch, pickles):
    "A folder's weight that its configuration does not ask for is named, in a safetensors file or in a pickle"
    from safetensors.torch import load_file, save_file
    monkeypatch.setenv('MAGIC123_WEIGHTS', str(tmp_path/'home'))
    home = stable_diffusion.tiny_random(tmp_path)
    file = home/'unet'/'diffusion_pytorch_model.safetensors'
    save_file(load_file(file) | {'conv_extra.weight': torch.ones(2)}, file, {'format': 'pt'})
    if pickles: pickled(home)
    with pytest.raises(UserError, match='has no place for, such as conv_extra.weight'): stable_diffusion.StableDiffusionPrior.load(home, 'a mug', device='cpu')

@pytest.mark.parametrize('variant', ['', 'fp16', 'fp16_ema'])
def test_weights_in_several_files(tmp_path, variant):
    "Sharded folders, as large models are published, give what the whole ones give; one that lacks a file does not load"
    from diffusers import UNet2DConditionModel
    home = stable_diffusion.tiny_random(tmp_path)
    wanted = stable_diffusion.load_part(UNet2DConditionModel, home/'unet')
    shards = several_files(home/'unet', variant)
    assert len(shards) > 2 and stable_diffusion.find_folder(home) == home and stable_diffusion.part_weights(home/'unet')[1] == variant
    found = stable_diffusion.load_part(UNet2DConditionModel, home/'unet')
    torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    (home/'unet'/shards[1]).unlink()
    with pytest.raises(UserError, match=f'lacks {shards[1]}'): stable_diffusion.load_part(UNet2DConditionModel, home/'unet')
    with pytest.raises(UserError, match=f'lacks unet/{shards[1]}'): stable_diffusion.find_folder(home)

def test_a_pickle_beside_a_broken_off_download(tmp_path, monkeypatch):
    "Of a part's two forms the whole one is converted, and the index of the other does not come along"
    from diffusers import UNet2DConditionModel
    monkeypatch.setenv('MAGIC123_WEIGHTS', str(tmp_path/'home'))
    home = stable_diffusion.tiny_random(tmp_path)
    wanted = stable_diffusion.load_part(UNet2DConditionModel, home/'unet')
    torch.save({name: t.half() for name, t in wanted.state_dict().items()}, home/'unet'/'diffusion_pytorch_model.bin')
    for shard in several_files(home/'unet')[1:]: (home/'unet'/shard).unlink()
    found = stable_diffusion.load_part(UNet2DConditionModel, stable_diffusion.find_folder(home)/'unet')
    torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=0, atol=0)

RACE = '''
import os, sys, time
from pathlib import Path
from magic123 import weights
from magic123.zero123 import ZERO123_PARTS
here, really = Path(sys.argv[1]), {name: getattr(weights, name) for name in ('convert', '_make_safe')}
def counted(name):
    def work(*args):
        (here/f'{name}.{os.getpid()}').touch()
        time.sleep(1)
        really[name](*args)
    return work
for name in really: setattr(weights, name, counted(name))
(here/f'ready.{os.getpid()}').touch()
while len(list(here.glob('ready.*'))) < 2: time.sleep(.01)
for source in ('105000.ckpt', 'pickled'): print(weights.bring(here/source, ZERO123_PARTS))
'''

def test_two_processes_convert_once(tmp_path):
    "Started together, one converts and the other waits; both get the same folder"
    weights.tiny_checkpoint(tmp_path/'105000.ckpt', 'zero123')
    pickled(zero123.tiny_random(tmp_path)).rename(tmp_path/'pickled')
    env = os.environ | dict(MAGIC123_WEIGHTS=str(tmp_path/'home'))
    both = [subprocess.Popen([sys.executable, '-c', RACE, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=280)[0].split() for process in both]
    assert said[0] == said[1] and len(said[0]) == 2 and all(Path(folder).is_dir() for folder in said[0])
    assert len(list(tmp_path.glob('convert.*'))) == len(list(tmp_path.glob('_make_safe.*'))) == 1

# memory

MEMORY = '''
import os, sys, threading, time, torch
from magic123.weights import convert, read_tensors
from diffusers import AutoencoderKL, UNet2DConditionModel; from diffusers.loaders import single_file_utils; from transformers import CLIPVisionModelWithProjection
def anonymous(): return next(int(line.split()[1])/1024 for line in open('/proc/self/status') if line.startswith('RssAnon'))
peak, on, start = [0], [True], anonymous()
def watch():
    while on[0]: peak[0] = max(peak[0], anonymous()); time.sleep(.002)
thread = threading.Thread(target=watch); thread.start()
convert(sys.argv[1], sys.argv[2])
on[0] = False; thread.join()
print(peak[0] - start)
'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_conversion_needs_little_memory(tmp_path):
    "A checkpoint with 4 GB of optimiser beside the weights (holes in the file, so it needs no disk) is converted in a fraction of its size"
    state = {name: t for name, t in weights.old_names(weights.tiny_models('zero123'), 'zero123', average=1.).items() if name != 'alphas_cumprod'}
    with torch.serialization.skip_data(): torch.save(dict(state_dict=state, optimizer_states=[torch.empty(2**30)]), tmp_path/'large.ckpt')
    assert (tmp_path/'large.ckpt').stat().st_size > 4e9 and (tmp_path/'large.ckpt').stat().st_blocks*512 < 1e9
    more = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path/'large.ckpt'), str(tmp_path/'out')], capture_output=True, text=True)
    assert float(more.stdout.split()[-1]) < 300, more.stdout + more.stderr

# learned words

@pytest.mark.skipif(not REAL_EMBEDS, reason="the official repository's learned_embeds.bin are not here")
def test_official_learned_words():
    from magic123.textual_inversion import load_learned_embeds
    for path in REAL_EMBEDS:
        (token, vector), = load_learned_embeds(path).items()
        assert vector.shape == (768,) and token.startswith('_')
