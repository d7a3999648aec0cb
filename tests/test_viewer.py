"The widgets, in JupyterLab, with a mouse"
import io, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat
import numpy as np
import pytest
from PIL import Image
from conftest import MINIATURE, WITHOUT_PRIORS

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason='no Chromium or Chrome on this machine')
sync_api = pytest.importorskip('playwright.sync_api')
pytest.importorskip('jupyterlab')
PAGE = '''from magic123.viewer import *
import torch
torch.set_num_threads(1)
explore({one!r}, 160)
---
compare({one!r}, {two!r}, size=96)
---
dial({one!r}, {two!r}, size=96)
---
raise RuntimeError('no GPU') # tagged as `#| cuda` cells are
---
Live({live!r}, interval=.2)'''

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two runs that differ in what they made and in λ, and one that goes on"
    from test_cli import disc
    from magic123.image_to_mesh import Job, reconstruct
    home = tmp_path_factory.mktemp('runs')
    disc().save(home/'disc.png')
    for name, steps, weight in (('one', 24, 0), ('two', 6, .6)):
        recipe = MINIATURE | dict(photo=dict(depth='none'), coarse=MINIATURE['coarse'] | dict(steps=steps))
        reconstruct(home/'disc.png', home/name, 'quick', say=lambda text: None, **recipe, **WITHOUT_PRIORS)
        job = Job.open(home/name)
        job.recipe = job.recipe.replace({'coarse.weight_2d': weight, 'coarse.weight_3d': 1.})
        job.save()
    shutil.copytree(home/'one', home/'live', ignore=shutil.ignore_patterns('metrics.json', 'mesh*', 'log.jsonl'))
    return home

@pytest.fixture(scope='module')
def lab(runs, tmp_path_factory):
    "JupyterLab with a page of widgets: its address"
    home = tmp_path_factory.mktemp('lab')
    cells = [nbformat.v4.new_code_cell(c.strip()) for c in PAGE.format(one=str(runs/'one'), two=str(runs/'two'), live=str(runs/'live')).split('---')]
    cells[3].metadata['tags'] = ['raises-exception']
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', language='python', display_name='python3'))), home/'page.ipynb')
    env = os.environ | dict(JUPYTER_RUNTIME_DIR=str(home/'runtime'), JUPYTER_CONFIG_DIR=str(home/'config'), JUPYTERLAB_WORKSPACES_DIR=str(home/'workspaces'))
    argv = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--port=0', '--ip=127.0.0.1', '--IdentityProvider.token=', f'--ServerApp.root_dir={home}']
    with open(home/'log', 'w') as log: process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        ends = time.time() + 120
        while not (found := list((home/'runtime').glob('jpserver-*.json'))):
            if process.poll() is not None or time.time() > ends: pytest.fail((home/'log').read_text()[-2000:])
            time.sleep(.1)
        time.sleep(.5)
        yield json.loads(found[0].read_text())['url'] + 'lab/tree/page.ipynb'
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)

@pytest.fixture(scope='module')
def page(lab):
    "The page, all its cells run"
    with sync_api.sync_playwright() as p:
        try: browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
        except sync_api.Error as e: pytest.skip(f'the browser does not start here: {str(e)[:200]}')
        page = browser.new_page(viewport=dict(width=1400, height=2400))
        page.set_default_timeout(120_000)
        page.broken = []
        page.on('pageerror', lambda e: page.broken.append(str(e)))
        page.goto(lab)
        page.locator('.jp-Notebook').wait_for()
        page.get_by_text('| Idle').wait_for() # else it asks for a kernel
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
        page.locator('.magic123-orbit').nth(2).wait_for()
        page.get_by_role('button', name='Follow').wait_for()
        yield page
        browser.close()

def pixels(data): return np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(float)
def shown(image): # what the browser has, not what was sent
    return pixels(bytes(image.evaluate('async (img) => Array.from(new Uint8Array(await (await fetch(img.src)).arrayBuffer()))')))

def shows(page, image, folder, azimuth, polar=90, radius=1.8, stage='mesh', what='colour'):
    "Wait until a picture is the one that it should be, and not the one from a few degrees beside"
    from magic123.cameras import Camera
    from magic123.viewer import look, scene_of
    height = image.evaluate('(img) => parseInt(img.style.height)')
    def drawn(azimuth):
        look(scene_of(folder, stage), Camera.orbit(polar, azimuth, radius, height=height), what).save(out := io.BytesIO(), 'JPEG', quality=90)
        return pixels(out.getvalue())
    truth, beside = drawn(azimuth), drawn(azimuth + 8)
    off = lambda: abs(seen - truth).mean() if (seen := shown(image)).shape == truth.shape else np.inf
    for _ in range(300):
        if off() < abs(beside - truth).mean()/2: return True
        page.wait_for_timeout(100)
    raise AssertionError(f'{image.evaluate("(i) => i.nextSibling.textContent")} is off by {off():.2f} at {azimuth=} {polar=} {radius=}, {abs(beside - truth).mean():.2f} beside')

def drag(page, image, dx, dy):
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    x, y = box['x'] + box['width']/2, box['y'] + box['height']/2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=8)
    page.mouse.up()

def test_turning_a_run(page, runs):
    cell = page.locator('.jp-CodeCell').nth(0)
    orbit = cell.locator('.magic123-orbit')
    image = orbit.locator('img')
    assert shows(page, image, runs/'one', 0)
    drag(page, image, 120, 40)
    assert shows(page, image, runs/'one', -60, 70)
    cell.get_by_role('button', name='normals').click()
    assert shows(page, image, runs/'one', -60, 70, what='normals')
    cell.get_by_role('button', name='coarse').click()
    assert shows(page, image, runs/'one', -60, 70, stage='coarse', what='normals')
    assert orbit.locator('figcaption').inner_text() == 'coarse'
    cell.get_by_role('button', name='mesh').click()
    cell.get_by_role('button', name='colour').click()
    image.hover()
    page.mouse.wheel(0, 500)
    assert shows(page, image, runs/'one', -60, 70, 1.8*np.exp(.5))
    orbit.focus()
    page.keyboard.press('ArrowLeft')
    assert shows(page, image, runs/'one', -50, 70, 1.8*np.exp(.5))
    image.dblclick()
    assert shows(page, image, runs/'one', 0)
    assert 'reference psnr' in cell.inner_text() and not page.broken

def test_turning_two_together(page, runs):
    cell = page.locator('.jp-CodeCell').nth(1)
    images = cell.locator('.magic123-orbit img')
    assert images.count() == 2 and cell.locator('figcaption').all_inner_texts() == ['one', 'two']
    drag(page, images.nth(1), -60, 0)
    assert shows(page, images.nth(0), runs/'one', 30) and shows(page, images.nth(1), runs/'two', 30) and not page.broken

def test_the_dial(page, runs):
    cell = page.locator('.jp-CodeCell').nth(2)
    image, handle = cell.locator('.magic123-orbit img'), cell.locator('.noUi-handle')
    assert cell.locator('figcaption').inner_text() == 'λ = 0' and shows(page, image, runs/'one', 0)
    drag(page, image, -40, 0)
    assert shows(page, image, runs/'one', 20)
    handle.focus()
    page.keyboard.press('ArrowRight')
    assert shows(page, image, runs/'two', 20) and cell.locator('figcaption').inner_text() == 'λ = 1'
    assert cell.locator('.widget-readout').inner_text() == '1' and not page.broken

def test_run_all_goes_on_after_a_cell_that_misses_its_gpu(page):
    assert 'RuntimeError: no GPU' in page.locator('.jp-CodeCell').nth(3).inner_text()
    assert page.locator('.jp-CodeCell').nth(4).get_by_role('button', name='Follow').count() == 1

def test_watching(page, runs):
    cell = page.locator('.jp-CodeCell').nth(4)
    plot, words = cell.locator('.widget-image').nth(0), cell.locator('.widget-label').last
    assert words.inner_text() == 'nothing yet'
    before = shown(plot)
    cell.get_by_role('button', name='Follow').click()
    lines = (runs/'one'/'log.jsonl').read_text().splitlines(keepends=True)
    with open(runs/'live'/'log.jsonl', 'w') as log:
        for line in lines[:20]: log.write(line)
    sync_api.expect(words).to_have_text('coarse step 20')
    with open(runs/'live'/'log.jsonl', 'a') as log: log.write(''.join(lines[20:]))
    (runs/'live'/'metrics.json').write_text('{}')
    sync_api.expect(words).to_have_text('fine step 12, done')
    for _ in range(100):
        if shown(plot).shape != before.shape: break # a second panel
        page.wait_for_timeout(100)
    assert shown(plot).shape[1] == 2*before.shape[1] and not page.broken
    sync_api.expect(cell.locator('.widget-toggle-button')).not_to_have_class('mod-active')
