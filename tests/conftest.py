"A run in miniature that several tests share: seconds, random priors, every file"
import json, os
import pytest
import zygote

STAGE = dict(resolution=16, reference_resolution=16, checkpoint_interval=4, checkpoint_seconds=0., preview_interval=8, preview_seconds=0., light=dict(albedo=1., normal_fraction=0.))
MINIATURE = dict(
    name='quick', threads=1,
    coarse=dict(steps=24, lr=dict(table=.05, mlp=.01)) | STAGE,
    fine=dict(steps=12) | STAGE,
    nerf=dict(levels=4, log2_entries=10, finest=32, masked_levels=2, occupancy=16, samples=32),
    dmtet=dict(resolution=12, samples=24),
    export=dict(texture=64, turntable_views=2, turntable_size=32))
WITHOUT_PRIORS = {f'{stage}.weight_{d}d': 0. for stage in ('coarse', 'fine') for d in (2, 3)}

zygote.install()

@pytest.fixture(autouse=True)
def environment():
    "Every test finds the variables that the first one found; Dask, for one, sets some for good"
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys(): del os.environ[name]
    os.environ.update(before)

@pytest.fixture
def ordinary():
    "Processes start as users start them"
    with zygote.zygote.away(): yield

@pytest.fixture(scope='session')
def priors(tmp_path_factory):
    "Both priors with random weights, as settings"
    from magic123 import stable_diffusion, zero123
    home = tmp_path_factory.mktemp('priors')
    return dict(stable_diffusion=str(stable_diffusion.tiny_random(home)), zero123=str(zero123.tiny_random(home)))

@pytest.fixture(scope='session')
def photo(tmp_path_factory):
    "A mug with its depth beside it, as a file: unlike a toy it has no other views that would have to be compared"
    import torch
    from magic123.cameras import Camera
    from magic123.show import save_png
    from magic123.toybox import make_toy
    path = tmp_path_factory.mktemp('photo')/'mug.png'
    view = make_toy('mug', 900_003).render(Camera.orbit(height=64))
    save_png(path, torch.cat([view.rgb, view.alpha], -1))
    save_png(path.with_name('mug_depth.png'), 1.5 - view.depth/2)
    return str(path)

@pytest.fixture(scope='session')
def recipe_file(priors, tmp_path_factory):
    "The miniature with both priors, as a file for `--recipe`"
    path = tmp_path_factory.mktemp('recipe')/'miniature.json'
    path.write_text(json.dumps(MINIATURE | dict(priors=priors)))
    return str(path)

def lay_photos(grid, folder):
    "What a grid names, in a folder: the photos that are not the book's to give"
    from pathlib import Path
    from PIL import Image
    from magic123.experiment import read_grid
    names = [o for o in read_grid(grid).objects if not o.startswith('toybox:')]
    for name in names:
        (Path(folder)/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGBA', (8, 8)).save(Path(folder)/name)
    return names
