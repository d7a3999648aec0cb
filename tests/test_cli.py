"Whatever the user gets wrong, a clear sentence and nothing lost"
import json, os, resource, shutil, subprocess, sys
from contextlib import nullcontext
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import MINIATURE, WITHOUT_PRIORS
from magic123.cli import main
from zygote import zygote

SHORT = MINIATURE | dict(coarse=MINIATURE['coarse'] | dict(steps=3, weight_2d=0, weight_3d=0), fine=MINIATURE['fine'] | dict(steps=2, weight_2d=0, weight_3d=0))

@pytest.fixture(scope='session')
def short(tmp_path_factory):
    "A run of five steps without priors"
    path = tmp_path_factory.mktemp('short')/'short.json'
    path.write_text(json.dumps(SHORT))
    return str(path)

@pytest.fixture
def shell(capsys):
    "Run the command line here: exit code, and all that was said on one line"
    def run(*argv):
        code = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert 'Traceback' not in out + err
        return code, ' '.join((out + err).split())
    return run

def disc(size=(48, 48)):
    "An orange disc, RGBA"
    y, x = np.mgrid[:size[1], :size[0]]
    inside = ((x - size[0]/2)/size[0])**2 + ((y - size[1]/2)/size[1])**2 < .1
    return Image.fromarray(np.dstack([np.full_like(x, v) for v in (230, 120, 30)] + [255*inside]).astype(np.uint8))

def on_white(image): return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')

# bad files

def truncated(path):
    on_white(disc((200, 200))).save(path.with_suffix('.png'))
    data = path.with_suffix('.png').read_bytes()
    path.write_bytes(data[:len(data)//2])

BAD = {
    'missing': (lambda p: None, 'There is no file'),
    'empty': (lambda p: p.write_bytes(b''), 'is empty'),
    'truncated': (truncated, 'cannot be decoded'),
    'text': (lambda p: p.write_text('a picture of a bear'), 'is not a picture'),
    'one_pixel': (lambda p: Image.new('RGB', (1, 1)).save(p, 'PNG'), 'too small'),
    'transparent': (lambda p: Image.new('RGBA', (64, 64), (255, 0, 0, 0)).save(p, 'PNG'), 'transparent everywhere')}

@pytest.mark.parametrize('name', BAD)
def test_bad_picture(name, tmp_path, shell, short):
    make, words = BAD[name]
    path = tmp_path/f'{name}.img'
    make(path)
    code, said = shell('run', path, '--recipe', short, '--out', tmp_path/'out')
    assert code == 2 and words in said and path.name in said
    assert not (tmp_path/'out').exists()

# odd files

def turned(path):
    exif = Image.Exif()
    exif[0x112] = 6
    on_white(disc((64, 48))).save(path, 'JPEG', exif=exif)

def animated(path): disc().save(path, 'GIF', save_all=True, append_images=[disc((48, 48)).rotate(90)])

ODD = {
    'grey': lambda p: on_white(disc()).convert('L').save(p, 'PNG'),
    'sixteen_bit': lambda p: Image.fromarray(np.asarray(on_white(disc()).convert('L')).astype(np.uint16)*257).save(p, 'PNG'),
    'cmyk': lambda p: on_white(disc()).convert('CMYK').save(p, 'JPEG'),
    'animated': animated,
    'turned': turned,
    'opaque': lambda p: Image.new('RGBA', (48, 48), (200, 90, 30, 255)).save(p, 'PNG'),
    'at_the_border': lambda p: disc((96, 96)).crop((40, 0, 96, 96)).save(p, 'PNG')}

def test_odd_pictures_become_meshes_or_say_why(tmp_path, shell, short):
    (tmp_path/'photos').mkdir()
    for name, make in ODD.items(): make(tmp_path/'photos'/f'{name}.png')
    code, said = shell('run', tmp_path/'photos', '--recipe', short, '--out', tmp_path/'out')
    ended = {p.parent.name for p in (tmp_path/'out').glob('*/mesh.glb')}
    assert {'grey', 'sixteen_bit', 'cmyk', 'animated', 'turned', 'at_the_border'} <= ended, said
    assert code == (0 if 'opaque' in ended else 2) and ('opaque' in ended or 'opaque.png failed:' in said)

def test_huge_picture_is_read_in_little_memory(tmp_path):
    from magic123.preprocess import load_reference
    on_white(disc()).resize((10_000, 10_000), Image.Resampling.NEAREST).save(tmp_path/'huge.png', compress_level=1)
    reference = load_reference(tmp_path/'huge.png', mask='grabcut', depth='none')
    assert max(reference.rgb.shape) <= 2048

# names that are no text, and terminals that cannot write them

@pytest.mark.parametrize('picture, folder', [(b'caf\xe9.png', b'caf\xe9'), ('größe.png'.encode(), 'größe'.encode())])
def test_odd_names_on_a_poor_terminal(picture, folder, tmp_path, short):
    home = os.fsencode(tmp_path)
    picture, folder = os.path.join(home, picture), os.path.join(home, folder)
    disc().save(os.fsdecode(picture), 'PNG')
    argv = [sys.executable, '-m', 'magic123.cli', 'run', picture, '--recipe', short, '--out', folder, '--photo.depth', 'none']
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONIOENCODING='ascii')
    for command, start in (argv, zygote.away()), ([*argv[:3], 'resume', folder], nullcontext()): # begun as by a user
        with start: done = subprocess.run(command, env=env, capture_output=True)
        assert done.returncode == 0 and os.path.isfile(os.path.join(folder, b'mesh.glb')), done.stderr
        os.unlink(os.path.join(folder, b'metrics.json'))

# bad recipes

@pytest.mark.parametrize('words, flags', {
    'coarse.lr.table is nan; it must be a finite number': ['--coarse.lr.table', 'nan'],
    'coarse.weights.rgb is inf; it must be a finite number': ['--coarse.weights.rgb', 'inf'],
    'coarse.steps is 0; it must be at least 1': ['--coarse.steps', '0'],
    'camera.polar is 190.0; it must be at least 1 and at most 179': ['--camera.polar', '190'],
    'novel.polar is (100.0, 50.0); it must be two numbers a <= b': ['--novel.polar', '100', '50'],
    '--coarse.steps': ['--coarse.stps', '3'],
    "invalid literal for int() with base 10: 'many'": ['--coarse.steps', 'many'],
    "There is no recipe called 'fast'": ['--recipe', 'paper', '--recipe', 'fast'],
    'A toy brings its own frame, and shape crop was asked for Take pad': ['--photo.shape', 'crop'],
    'A toy brings its own frame, and recentre 0.75 was asked for Take 0.0': ['--photo.recentre', '.75'],
    'nerf.finest is 8; it must be no less than nerf.base, 16': ['--nerf.finest', '8'],
    'There is no file nowhere.safetensors': ['--prompt.learned-embeds', 'nowhere.safetensors'],
    "The device 'cuda:77' cannot be used": ['--device', 'cuda:77', '--coarse.weight-2d', '0', '--coarse.weight-3d', '0', '--fine.weight-2d', '0', '--fine.weight-3d', '0'],
    'No such folder: ./nowhere': ['--priors.zero123', './nowhere', '--coarse.weight-2d', '0', '--fine.weight-2d', '0']}.items())
def test_bad_recipe(words, flags, tmp_path, shell):
    code, said = shell('run', 'toybox:mug:900003', '--out', tmp_path/'out', *flags)
    assert code == 2 and words in said, said
    assert not (tmp_path/'out').exists()

def test_unknown_field_in_a_file(tmp_path, shell):
    (tmp_path/'mine.json').write_text('{"coarse": {"stps": 3}}')
    code, said = shell('run', 'toybox:mug:900003', '--recipe', tmp_path/'mine.json', '--out', tmp_path/'out')
    assert code == 2 and 'there is no setting coarse.stps: did you mean coarse.steps?' in said

@pytest.mark.parametrize('text, words', {
    '{"name": ["x"]}': 'holds no recipe', '{"recipe": 5}': 'holds no recipe', '{"coarse": 5}': 'coarse is 5; it must be a group such as',
    '{"export": {"formats": "glb"}}': "export.formats is 'glb'; it must be a list in square brackets", '{"seed": {"x": 1}}': 'there is no setting seed.x'}.items())
def test_recipe_of_the_wrong_shape(text, words, tmp_path, shell):
    (tmp_path/'mine.json').write_text(text)
    code, said = shell('run', 'toybox:mug:900003', '--recipe', tmp_path/'mine.json', '--out', tmp_path/'out')
    assert code == 2 and words in said and not (tmp_path/'out').exists()

def test_the_last_recipe_counts(tmp_path, shell, short):
    disc().save(tmp_path/'disc.png')
    assert shell('run', tmp_path/'disc.png', '--recipe', 'paper', '--recipe', short, '--out', tmp_path/'out')[0] == 0
    assert json.loads((tmp_path/'out'/'recipe.json').read_text())['recipe']['coarse']['steps'] == 3

def test_unknown_toy(tmp_path, shell, short):
    code, said = shell('run', 'toybox:unicorn:3', '--recipe', short, '--out', tmp_path/'out')
    assert code == 2 and 'unicorn' in said

# bad folders

def test_existing_folder(tmp_path, shell, short):
    run = 'run', 'toybox:mug:900003', '--recipe', short, '--out', tmp_path/'out'
    assert shell(*run)[0] == 0
    before = (tmp_path/'out'/'mesh.glb').read_bytes()
    code, said = shell(*run)
    assert code == 2 and 'already exists' in said and f'magic123 resume {tmp_path/"out"}' in said
    assert (tmp_path/'out'/'mesh.glb').read_bytes() == before
    assert shell(*run, '--overwrite')[0] == 0
    assert shell('export', tmp_path/'out', '--format', 'obj', 'ply')[0] == 0 and (tmp_path/'out'/'mesh.obj').is_file()
    assert shell('render', tmp_path/'out', '--views', 2, '--size', 32, '--device', 'cpu')[0] == 0
    for words in (['render', '--views', 0], ['render', '--views', -3], ['render', '--size', 1], ['export', '--max-faces', 1], ['export', '--texture', 0]):
        films = (tmp_path/'out'/'turntable.mp4').read_bytes()
        code, said = shell(words[0], tmp_path/'out', *words[1:])
        assert code == 2 and 'it must be at least' in said and (tmp_path/'out'/'turntable.mp4').read_bytes() == films
    assert shell('resume', tmp_path/'out')[0] == 0
    (tmp_path/'out'/'metrics.json').write_text('{}')
    code, said = shell('resume', tmp_path/'out')
    assert code == 2 and 'metrics.json is damaged' in said
    (tmp_path/'out'/'metrics.json').unlink()
    (tmp_path/'out'/'reference'/'reference.safetensors').write_bytes(b'half')
    code, said = shell('resume', tmp_path/'out')
    assert code == 2 and 'reference.safetensors is damaged' in said

def test_here_and_behind_a_link(tmp_path, shell, short, monkeypatch):
    disc().save(tmp_path/'disc.png')
    (tmp_path/'here').mkdir()
    (tmp_path/'link').symlink_to('there')
    (tmp_path/'there').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    for out in ('.', tmp_path/'link'):
        for more in ([], ['--overwrite']):
            code, said = shell('run', tmp_path/'disc.png', '--recipe', short, '--out', out, *more)
            assert code == 0, said
    assert all((tmp_path/name/'mesh.glb').is_file() for name in ('here', 'there')) and (tmp_path/'link').is_symlink()

def test_another_scene_in_the_recipe(tmp_path, shell, short):
    disc().save(tmp_path/'disc.png')
    assert shell('run', tmp_path/'disc.png', '--recipe', short, '--out', tmp_path/'out')[0] == 0
    path = tmp_path/'out'/'recipe.json'
    path.write_text(path.read_text().replace('"log2_entries": 10', '"log2_entries": 11'))
    for command in ('export', 'resume'):
        code, said = shell(command, tmp_path/'out')
        assert code == 2 and 'of another scene than the recipe describes' in said
        (tmp_path/'out'/'metrics.json').unlink(missing_ok=True) # or there is nothing to resume

def test_no_files_asked_for_no_film_promised(tmp_path, shell, short):
    disc().save(tmp_path/'disc.png')
    code, said = shell('run', tmp_path/'disc.png', '--recipe', short, '--out', tmp_path/'out', '--export.formats')
    assert code == 0 and 'film' not in said and 'GB; pictures and all numbers' in said
    code, said = shell('run', tmp_path/'disc.png', '--recipe', short, '--out', tmp_path/'other')
    assert code == 0 and 'GB; a film, pictures and all numbers' in said

def test_closing_words(tmp_path):
    from magic123.cli import _in_words
    from magic123.image_to_mesh import Result
    m = dict(mesh=dict(faces=9), reference=dict(psnr=20., mask_iou=.9), seconds=dict(coarse=3.), peak_memory_gb=1.)
    assert 'not finite' not in _in_words(Result(Path('a'), Path('a/mesh.glb'), m | dict(skipped=dict(coarse=0, fine=0))))
    assert 'in 3 coarse steps' in _in_words(Result(Path('a'), Path('a/mesh.glb'), m | dict(skipped=dict(coarse=3, fine=0))))
    assert 'No mesh file was asked for' in _in_words(Result(tmp_path, tmp_path/'mesh.glb', m))
    (tmp_path/'turntable.mp4').touch()
    assert f'mesh.glb is gone; `magic123 export {tmp_path} --format glb`' in _in_words(Result(tmp_path, tmp_path/'mesh.glb', m))

def test_folder_with_other_things(tmp_path, shell, short):
    (tmp_path/'thesis.tex').write_text('years of work')
    code, said = shell('run', 'toybox:mug:900003', '--recipe', short, '--out', tmp_path, '--overwrite')
    assert code == 2 and 'is not a run' in said and (tmp_path/'thesis.tex').exists()

def test_any_recipe_json_is_no_run(tmp_path, shell, short):
    for name, text in {'recipe.json': '{"cake": 1}', 'precious.txt': 'years of work'}.items(): (tmp_path/name).write_text(text)
    code, said = shell('run', 'toybox:mug:900003', '--recipe', short, '--out', tmp_path, '--overwrite')
    assert code == 2 and 'is not a run' in said and (tmp_path/'precious.txt').exists() and (tmp_path/'recipe.json').read_text() == '{"cake": 1}'

def test_file_in_the_way(tmp_path, shell, short):
    (tmp_path/'file').write_text('')
    code, said = shell('run', 'toybox:mug:900003', '--recipe', short, '--out', tmp_path/'file'/'out')
    assert code == 2 and 'a file is where a folder should be' in said

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_folder_without_permission(tmp_path, shell, short):
    tmp_path.chmod(0o500)
    code, said = shell('run', 'toybox:mug:900003', '--recipe', short, '--out', tmp_path/'out')
    tmp_path.chmod(0o700)
    assert code == 2 and 'permission denied' in said

@pytest.mark.parametrize('where, argv', [('read_photo', 'run disc.png'), ('pictures_in', 'run .'), ('begin_run', 'run .'), ('check_folder', 'run disc.png --out out'),
    ('Job.open', 'resume out'), ('Job.open', 'render out'), ('read_photo', 'learn disc.png')])
def test_what_may_not_be_looked_at(where, argv, tmp_path, shell, monkeypatch):
    "Root may look anywhere, so the system's refusal is played"
    def refuse(*_, **__): raise PermissionError(13, 'Permission denied', 'secret')
    disc().save(tmp_path/'disc.png')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f'magic123.image_to_mesh.{where}', refuse)
    code, said = shell(*argv.split())
    assert code == 2 and 'secret may not be read or written: permission denied Change its permissions' in said and 'unexpected' not in said, said

def test_a_run_is_called_after_photo_and_recipe(tmp_path, shell, short, monkeypatch):
    asked = []
    monkeypatch.setattr('magic123.image_to_mesh.reconstruct', lambda image, out, *_: asked.append(Path(out)) or [])
    (tmp_path/'pix.v1').mkdir()
    monkeypatch.chdir(tmp_path/'pix.v1')
    for argv in ('.', '../pix.v1', '..', 'disc.png', f'disc.png --recipe {short}'): assert shell('run', *argv.split())[0] == 0
    assert asked == [Path('runs')/name for name in ('pix.v1-quick', 'pix.v1-quick', f'{tmp_path.name}-quick', 'disc-quick', 'disc-short')]

@pytest.mark.parametrize('command', ['resume', 'render', 'export'])
def test_not_a_run(command, tmp_path, shell):
    code, said = shell(command, tmp_path)
    assert code == 2 and 'is not a run' in said

def test_disk_fills_up_and_the_run_continues(tmp_path):
    "A limit on the size of files stands in for a full disk: checkpoints outgrow it once they hold Adam's memories"
    disc().save(tmp_path/'disc.png')
    (tmp_path/'mine.json').write_text(json.dumps(MINIATURE | WITHOUT_PRIORS | dict(photo=dict(depth='none'))))
    argv = [sys.executable, '-m', 'magic123.cli', 'run', str(tmp_path/'disc.png'), '--recipe', str(tmp_path/'mine.json'), '--out', str(tmp_path/'whole')]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    assert subprocess.run(argv, env=env, capture_output=True).returncode == 0
    checkpoint = max(p.stat().st_size for p in (tmp_path/'whole'/'coarse').glob('*.safetensors'))
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint - 1, checkpoint - 1))
    argv[-1] = str(tmp_path/'out')
    said = subprocess.run(argv, env=env, preexec_fn=limited, capture_output=True, text=True)
    assert said.returncode == 2 and 'Could not write' in said.stderr and 'Traceback' not in said.stderr, said.stderr
    assert [p.name for p in (tmp_path/'out'/'coarse').glob('*.json')] == ['step_0000000.json']
    assert subprocess.run([*argv[:3], 'resume', str(tmp_path/'out')], env=env, capture_output=True).returncode == 0
    for stage in ('coarse', 'fine'):
        a, b = (sorted((tmp_path/name/stage).glob('*.safetensors'))[-1].read_bytes() for name in ('whole', 'out'))
        assert a == b

def test_a_word_is_learned_and_spoken(tmp_path, shell, short, priors):
    disc().save(tmp_path/'disc.png')
    (tmp_path/'mine.json').write_text(json.dumps(SHORT | dict(priors=priors, coarse=SHORT['coarse'] | dict(weight_2d=1))))
    learn = 'learn', tmp_path/'disc.png', '--recipe', tmp_path/'mine.json', '--steps', 2, '--out', tmp_path/'word.safetensors'
    code, said = shell(*learn)
    assert code == 0 and f'--prompt.learned-embeds {tmp_path/"word.safetensors"}' in said, said
    assert shell(*learn)[0] == 2 and shell(*learn, '--overwrite')[0] == 0
    run = 'run', tmp_path/'disc.png', '--recipe', tmp_path/'mine.json', '--prompt.learned-embeds', tmp_path/'word.safetensors', '--out', tmp_path/'out'
    code, said = shell(*run)
    assert code == 0 and 'with the learned token <e>' in said
    code, said = shell(*run, '--overwrite', '--prompt.text', 'a red toy')
    assert code == 0 and 'The learned <e> is not used' in said

# a run that goes on elsewhere, with less memory, or with other weights

def stopped(*_, **__): raise KeyboardInterrupt

@pytest.fixture
def half_done(tmp_path, shell, priors, monkeypatch):
    "A folder with a run in `out` that was stopped before its last part; its priors were named from there"
    home = tmp_path/'home'
    shutil.copytree(Path(priors['zero123']).parent, home/'weights')
    disc().save(home/'disc.png')
    (home/'mine.json').write_text(json.dumps(SHORT | dict(photo=dict(depth='none'), prompt=dict(text='a red toy'), coarse=SHORT['coarse'] | dict(weight_2d=1, weight_3d=1),
        priors=dict(stable_diffusion='weights/stable_diffusion', zero123='./weights/zero123'))))
    monkeypatch.chdir(home)
    with monkeypatch.context() as m:
        m.setattr('magic123.image_to_mesh.write_files', stopped)
        assert shell('run', 'disc.png', '--recipe', 'mine.json', '--out', home/'out')[0] == 130
    return home

def test_priors_are_found_from_elsewhere(half_done, tmp_path, shell, monkeypatch):
    "And their weights, which are as they were, are not read for their fingerprints again"
    from magic123.image_to_mesh import Job, _other
    from magic123.recipe import Recipe
    for more in ({}, {'low_memory': True}): assert _other(Job.open('out'), 'disc.png', Recipe.load('mine.json').replace(more)) == ''
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('magic123.image_to_mesh._sha256', None)
    code, said = shell('resume', half_done/'out')
    assert code == 0 and 'Poses: zero123, by the name of the weights' in said and 'are not those' not in said

def test_changed_weights_are_noticed(half_done, shell):
    from safetensors.torch import load_file, save_file
    file = half_done/'weights'/'zero123'/'unet'/'diffusion_pytorch_model.safetensors'
    save_file({name: 2*weight for name, weight in load_file(file).items()}, file, {'format': 'pt'})
    code, said = shell('resume', half_done/'out')
    assert code == 0 and 'The weights of the 3D prior are not those that this run has had so far: unet/diffusion_pytorch_model.safetensors' in said
    assert any('are not those' in note for note in json.loads((half_done/'out'/'recipe.json').read_text())['notes'])
    (half_done/'out'/'metrics.json').unlink()
    code, said = shell('resume', half_done/'out')
    assert code == 0 and 'are not those' not in said

def full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8.00 GiB. Of the allocated memory')

def test_memory_runs_out_and_the_run_continues(tmp_path, shell, short, monkeypatch):
    from magic123.optimise import Run
    disc().save(tmp_path/'disc.png')
    advance, out = Run.advance, tmp_path/'out'
    low = lambda: json.loads((out/'recipe.json').read_text())['recipe']['low_memory']
    with monkeypatch.context() as m:
        m.setattr(Run, 'advance', lambda run, *args: full() if (run.folder.name, run.progress.step) == ('fine', 1) else advance(run, *args))
        code, said = shell('run', tmp_path/'disc.png', '--recipe', short, '--out', out)
        assert code == 2 and 'Error: The memory is full: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8.00 GiB All' in said, said
        assert f'`magic123 resume {out} --low-memory`' in said and '--coarse.resolution 16' in said and not low()
        code, said = shell('resume', out, '--low-memory')
        assert code == 2 and f'`magic123 resume {out}` where there is more' in said and low()
    assert shell('resume', out)[0] == 0 and low()
    steps = [(line['stage'], line['step']) for line in map(json.loads, open(out/'log.jsonl'))]
    assert steps == [('coarse', 1), ('coarse', 2), ('coarse', 3), ('fine', 1), ('fine', 2)]

def test_memory_runs_out_while_a_word_is_learned(tmp_path, shell, short, priors, monkeypatch):
    disc().save(tmp_path/'disc.png')
    (tmp_path/'mine.json').write_text(json.dumps(SHORT | dict(priors=priors)))
    learn = 'learn', tmp_path/'disc.png', '--recipe', tmp_path/'mine.json', '--steps', 2, '--out', tmp_path/'word.safetensors'
    with monkeypatch.context() as m:
        m.setattr('magic123.image_to_mesh.invert', full)
        code, said = shell(*learn)
        assert code == 2 and 'Nothing was written. Learn it with --low-memory' in said and not (tmp_path/'word.safetensors').exists()
    assert shell(*learn, '--low-memory')[0] == 0 and (tmp_path/'word.safetensors').is_file()

def test_one_of_several_processes_has_no_memory_left(shell, monkeypatch):
    "It goes on to no other photo, for the others wait for it at this one; and it says so, whichever it is"
    from magic123 import image_to_mesh
    from magic123.many_gpus import Team
    monkeypatch.setattr(image_to_mesh, 'join', lambda: Team(1, 2))
    def run(*_, **__):
        with image_to_mesh.enough_memory('Wait'): full()
    with pytest.raises(image_to_mesh.OutOfMemory): image_to_mesh.one_by_one({Path('a'): run, Path('b'): run}, lambda text: None)
    monkeypatch.setattr(image_to_mesh, 'reconstruct', run)
    for name in ('RANK', 'LOCAL_RANK'): monkeypatch.setenv(name, '1')
    code, said = shell('run', 'photos')
    assert code == 2 and 'The memory is full' in said

# an empty volume, and our own mistakes

def test_empty_volume_is_an_error_with_a_way_out(tmp_path, shell, short):
    flags = '--nerf.blob-density', -60, '--nerf.blob-radius', 2, '--coarse.lr.table', 0, '--coarse.lr.mlp', 0
    code, said = shell('run', 'toybox:mug:900003', '--recipe', short, '--out', tmp_path/'out', *flags)
    assert code == 2 and 'The coarse stage left no object behind' in said and 'coarse.weights.mask' in said
    assert list((tmp_path/'out'/'coarse').glob('*.safetensors'))

def test_unexpected_errors_are_named_and_debug_shows_them(tmp_path, shell, short, monkeypatch):
    import magic123.image_to_mesh
    def broken(*args, **kwargs): raise RuntimeError('mat1 and mat2 shapes cannot be multiplied\nand more')
    monkeypatch.setattr(magic123.image_to_mesh, 'reconstruct', broken)
    code, said = shell('run', 'toybox:mug:900003', '--recipe', short, '--out', tmp_path/'out')
    assert code == 1 and 'unexpected error: RuntimeError: mat1 and mat2 shapes cannot be multiplied' in said and '--debug' in said
    with pytest.raises(RuntimeError): main(['run', 'toybox:mug:900003', '--recipe', short, '--debug'])

# help

def test_help(shell):
    assert shell('--help')[0] == 0 and all(c in shell('--help')[1] for c in ('run', 'resume', 'render', 'export', 'learn', 'doctor'))
    code, said = shell('run', '--help', '--recipe', 'official')
    assert code == 0 and '--coarse.weights.normal-tv' in said and '5000' in said

def test_a_reader_who_has_seen_enough():
    command = subprocess.Popen([sys.executable, '-m', 'magic123.cli', 'run', '--help'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == ('', 141)

def test_doctor(shell):
    code, said = shell('doctor')
    assert code in (0, 1) and all(w in said for w in ('torch', 'numba', 'nvdiffrast', 'tinycudann', 'kaolin', 'ffmpeg', 'usd', 'tiny 2D prior', 'full 3D prior', 'magic123 weights fetch'))

def test_python_m(ordinary):
    done = subprocess.run([sys.executable, '-m', 'magic123.cli', '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'doctor' in done.stdout
