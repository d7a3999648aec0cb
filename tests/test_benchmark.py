"The benchmark is what its seeds and the renderer make of it, on every machine"
import shutil
import numpy as np
import pytest
from PIL import Image
from magic123.prior_figures import benchmark, benchmark_objects, check_benchmark
from magic123.show import UserError, data_folder
from magic123.toybox import MEASURE_SEEDS, SPLITS

ITEMS = benchmark()

def test_objects_are_the_rule_s():
    assert [(i.family, i.seed, i.split) for i in ITEMS] == [(i.family, i.seed, i.split) for i in benchmark_objects()]
    assert len(ITEMS) == 24 and all(i.seed in MEASURE_SEEDS and i.family in SPLITS[i.split] for i in ITEMS)
    assert len({value for i in ITEMS for value in (i.parts, i.reference, i.held_out)}) == 3*24

def test_every_object_is_bit_for_bit_the_same():
    assert check_benchmark() == []

def test_a_changed_pixel_is_found(tmp_path):
    item = ITEMS[0]
    for name in ('benchmark.json', f'{item.name}.png'): shutil.copy(data_folder()/'toybox'/name, tmp_path)
    pixels = np.array(Image.open(tmp_path/f'{item.name}.png'))
    pixels[256, 256, 0] ^= 1
    Image.fromarray(pixels).save(tmp_path/f'{item.name}.png')
    line, = check_benchmark(tmp_path, [item])
    assert line == f'{item.name}: the PNG: 1 of 262,144 pixels differ, by up to 1 of 255'

def test_a_missing_benchmark_is_said(tmp_path):
    with pytest.raises(UserError, match='no benchmark'): benchmark(tmp_path)
