"""Maps the top-level folders to `silva.*`.

The three folders have no `__init__.py`: as namespace portions they lose to any regular package, so a bare
`import kernels` from the checkout root still finds Hugging Face's package of that name.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = {f"silva.{folder}": folder for folder in ("engine", "kernels", "recipes")}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in [package, *(f"{package}.{sub}" for sub in find_namespace_packages(folder))]
    ],
    package_data={"silva.recipes": ["*.yaml"], "silva.recipes.mini": ["*.jsonl.gz", "*.md"]},
)
