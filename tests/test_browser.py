"The GLB shows in a browser as it does here"
import base64, shutil, subprocess
import numpy as np
import pytest
import torch
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
FLAGS = '--headless=new --no-sandbox --use-angle=swiftshader --enable-unsafe-swiftshader --hide-scrollbars --window-size=320,320 --virtual-time-budget=10000'.split()

def page(glb):
    "trimesh's offline three.js page with our file in it, seen from where the photo was taken"
    from trimesh import resources, util
    html = util.decompress(resources.get_bytes('templates/viewer.zip'), file_type='zip')['viewer.html.template'].read().decode()
    assert 'camera=gltf.cameras[0];' in html and '$B64GLTF' in html
    html = html.replace('centerControls(scene,camera,controls);', '') # look at the origin, not at the thing's middle
    html = html.replace('camera=gltf.cameras[0];', 'camera=new THREE.PerspectiveCamera(40,1,.1,10);camera.position.set(0,0,1.8);')
    return html.replace('$B64GLTF', base64.b64encode(glb).decode())

def patchwork():
    "A lopsided red and green thing"
    from magic123.export import textured_mesh
    from magic123.tets import marching_tets, tet_lattice
    vertices, tets = tet_lattice(24)
    sdf = .45 - (vertices*torch.tensor([1., 1.4, 1.])).norm(dim=1) + .1*vertices[:, 0]
    red, green = torch.tensor([.9, .1, .1]), torch.tensor([.1, .7, .1])
    return textured_mesh(*marching_tets(vertices, sdf, tets), lambda x: torch.where(x[:, :1] > 0, red, green), size=128)

@pytest.mark.skipif(BROWSER is None, reason='no Chromium or Chrome on this machine')
def test_glb_in_a_browser(tmp_path):
    from magic123.cameras import Camera
    from magic123.export import save_glb
    mesh = patchwork()
    save_glb(tmp_path/'mesh.glb', mesh)
    (tmp_path/'page.html').write_text(page((tmp_path/'mesh.glb').read_bytes()))
    done = subprocess.run([BROWSER, *FLAGS, f'--screenshot={tmp_path/"shot.png"}', f'file://{tmp_path/"page.html"}'], capture_output=True, text=True, timeout=120)
    if not (tmp_path/'shot.png').is_file(): pytest.skip(f'the browser takes no pictures here: {done.stderr[-200:]}')
    shot = torch.tensor(np.asarray(Image.open(tmp_path/'shot.png').convert('RGB')))/255
    ours = mesh.render(Camera.orbit(height=len(shot), width=shot.shape[1]))
    theirs, alpha = (shot < .98).any(-1), ours.alpha[..., 0] > .5
    assert (theirs & alpha).sum()/(theirs | alpha).sum() > .97
    inside = theirs & alpha
    redder = lambda rgb: (rgb[..., 0] > rgb[..., 1])[inside]
    assert (redder(shot) == redder(ours.rgb)).float().mean() > .97
