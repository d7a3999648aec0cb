"Everything about the package is said in settings.ini; this file only passes it on."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read('settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], url=cfg['git_url'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', keywords=cfg['keywords'],
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path']+'.*']), python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require=dict(dev=cfg['dev_requirements'].split()),
    entry_points=dict(console_scripts=['magic123=magic123.cli:main'], nbdev=['magic123=magic123._modidx:d']))
